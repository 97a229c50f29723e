/* SPDX-License-Identifier: MIT
 *
 * Whether a second thread pays just now. If another process holds a core, every region that ends with a
 * wait for all of its threads takes as long as that process's turns on it, some milliseconds, where the
 * work takes one: two threads become many times slower than one. So regions are watched: if the calling
 * thread waits far longer than its own share took, and that for a good part of the time, they run on it alone
 * for a while. No result depends on the number of threads: only the time does.
 */
#ifndef GPU_POOR_OPS_STALL_H
#define GPU_POOR_OPS_STALL_H

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace gpu_poor {

/* Nanoseconds of a clock that only goes forward. */
inline int64_t steady_now()
{
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

/* `now` is the clock: tests have their own. */
template <int64_t (*now)()>
class StallsBy {
    static constexpr int64_t kMs = 1000000;

  public:
    /* A wait is a stall from this long on; turns of a scheduler are longer. */
    static constexpr int64_t kMinWait = kMs / 5;
    /* Alone pays when a quarter of the time is lost, and 20 ms more than that have been. Single stalls are
     * interrupts, pages read from disk, a virtual machine's host: two of 0.2 ms within 100 ms, the rule before
     * this one, sent small models to one core, and kept them there, on a machine that was theirs. */
    static constexpr int64_t kShare = 4, kLost = 20 * kMs;
    /* How long to stay alone: doubled each time that it turns out soon that the company is still there. */
    static constexpr int64_t kFirst = 100 * kMs, kLongest = 1000 * kMs, kSoon = 200 * kMs;

    static bool alone() { return until_.load(std::memory_order_relaxed) > now(); }

    /* A piece of work that threads share, from its construction by the calling thread to its destruction. */
    class Region {
      public:
        Region() { restart(); }
        Region(const Region &) = delete;
        void restart() { begin_ = done_ = now(); }
        /* The calling thread has done what it can, and waits for the others. */
        void share_done() { done_ = now(); }
        ~Region()
        {
            const int64_t end = now();
            if (end - done_ > std::max(kMinWait, 2 * (done_ - begin_))) stalled(end - done_, end);
        }

      private:
        int64_t begin_, done_;
    };

  private:
    static void stalled(int64_t wait, int64_t at)
    {
        const int64_t since = at - last_.exchange(at, std::memory_order_relaxed);
        const int64_t kept = std::max<int64_t>(0, lost_.load(std::memory_order_relaxed) - since / kShare);
        lost_.store(kept + wait, std::memory_order_relaxed);
        if (kept + wait < kLost) return;
        const bool again = at - until_.load(std::memory_order_relaxed) < kSoon;
        const int64_t rest = again ? std::min(2 * rest_.load(std::memory_order_relaxed), kLongest) : kFirst;
        lost_.store(0, std::memory_order_relaxed);
        rest_.store(rest, std::memory_order_relaxed);
        until_.store(at + rest, std::memory_order_relaxed);
    }

    inline static std::atomic<int64_t> last_{0}, lost_{0}, until_{-kLongest}, rest_{kFirst};
};

using Stalls = StallsBy<steady_now>;

} // namespace gpu_poor

#endif
