/* SPDX-License-Identifier: MIT
 *
 * Torch's threads as a team that stays together over many parallel loops.
 *
 * A parallel region costs microseconds, to wake its threads and to wait for them: of a decoder's step, with
 * five loops a block and 25 us to each, a tenth of the time. A team is one region. The calling thread runs
 * its body; the others look for loops that it shares, and help as long as it lasts. Nobody waits for a thread
 * that is not there because another process has its core, unless it has a chunk in its hands.
 */
#ifndef GPU_POOR_OPS_TEAM_H
#define GPU_POOR_OPS_TEAM_H

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <utility>

#include "ops/stall.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gpu_poor {

class Team {
  public:
    /* body() on the calling thread, with a team for the loops in it: the one there is, or one that lasts as
     * long as body. None where one thread is all there is, or all that pays. */
    template <class Body>
    static void run(const Body &body)
    {
        const int64_t threads = torch::stable::get_num_threads();
        if (current_ || threads < 2 || Stalls::alone()) return body();
        Team team(threads);
        std::exception_ptr error;
        Stalls::Region region;
        torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
            if (first) return team.help();
            current_ = &team;
            try {
                body();
            } catch (...) {
                error = std::current_exception();
            }
            current_ = nullptr;
            region.restart(); /* the others have nothing to do: whoever does not come now is not there */
            team.closed_.store(true, std::memory_order_release);
        });
        if (error) std::rethrow_exception(error);
    }

    /* f(begin, end) for parts of [0, n) of at least `least`, on whoever there is. What one of them throws is
     * thrown when all are done. Loops inside of f are the thread's own. */
    template <class F>
    static void loop(int64_t n, int64_t least, const F &f)
    {
        Team *team = current_;
        if (!team || n <= least || Stalls::alone()) return f(0, n);
        const struct Sharing {
            explicit Sharing(Team *team) : team_(team) { current_ = nullptr; }
            ~Sharing() { current_ = team_; }
            Team *team_;
        } sharing(team);
        team->share(n, least, [](const void *loop, int64_t begin, int64_t end) {
            (*static_cast<const F *>(loop))(begin, end);
        }, &f);
    }

  private:
    using Call = void (*)(const void *loop, int64_t begin, int64_t end);

    explicit Team(int64_t threads) : threads_(threads) {}

    void share(int64_t n, int64_t least, Call call, const void *loop)
    {
        Stalls::Region region;
        call_ = call, loop_ = loop, n_ = n, done_ = 0;
        /* One chunk each. Smaller ones towards the end, for threads of unequal speed, begin more streams of
         * weights: a step of GPT-2's shape took 1.61 to 1.68 ms in place of 1.46, and 1.62 without a team. */
        chunk_ = std::max(least, (n + threads_ - 1) / threads_);
        left_.store(n, std::memory_order_release);
        while (chunk()) {}
        region.share_done();
        for (int64_t i = 0; done_.load(std::memory_order_acquire) < n; i++) pause(i);
        if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
    }

    void help()
    {
        for (int64_t i = 0; !closed_.load(std::memory_order_acquire); i++) {
            if (chunk()) i = 0;
            pause(i);
        }
    }

    /* Takes a chunk of the loop that is shared now, if any of it is left. Until a thread has taken one it may
     * see another loop's numbers, but only `left_` decides; from then on the loop can't end without it. */
    bool chunk()
    {
        int64_t left = left_.load(std::memory_order_acquire);
        while (left > 0) {
            const int64_t size = std::min<int64_t>(left, chunk_);
            if (!left_.compare_exchange_weak(left, left - size, std::memory_order_acq_rel)) continue;
            const int64_t begin = n_ - left;
            try {
                call_.load()(loop_, begin, begin + size);
            } catch (...) {
                if (!failed_.exchange(true)) error_ = std::current_exception();
            }
            done_.fetch_add(size, std::memory_order_release);
            return true;
        }
        return false;
    }

    /* Of the i-th look in vain. Where threads outnumber cores, what one waits for may need its core. */
    static void pause(int64_t i)
    {
        if (i > 1000) return std::this_thread::yield();
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }

    inline static thread_local Team *current_ = nullptr; /* of a thread that may share a loop */

    const int64_t threads_;
    std::atomic<Call> call_{nullptr};
    std::atomic<const void *> loop_{nullptr};
    std::atomic<int64_t> n_{0}, chunk_{1};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_; /* of the first that failed */
    alignas(64) std::atomic<int64_t> left_{0}; /* not taken yet: [n - left, n) */
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<bool> closed_{false};
};

} // namespace gpu_poor

#endif
