/* SPDX-License-Identifier: MIT
 *
 * Whether a second thread pays just now. If another process holds a core, every region that ends with a
 * wait for all of its threads takes as long as that process's turns on it, some milliseconds, where the
 * work takes one: two threads become many times slower than one. So regions are watched: if the calling
 * thread waits far longer than its own share took, and again soon after, regions run on it alone for a
 * while. No result depends on the number of threads: only the time does.
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
    /* One stall may be an interrupt, or a page read from disk; two within this time are company. */
    static constexpr int64_t kSoon = 100 * kMs;
    /* How long to stay alone: doubled each time that the first regions afterwards stall again. */
    static constexpr int64_t kFirst = 100 * kMs, kLongest = 1000 * kMs;

    static bool alone() { return until_.load(std::memory_order_relaxed) > now(); }

    /* One parallel region, from its construction by the calling thread to its destruction. */
    class Region {
      public:
        Region() : caller_(std::this_thread::get_id()), begin_(now()), done_(begin_) {}
        Region(const Region &) = delete;
        /* Each thread at the end of its share; the caller's is what counts. */
        void share_done()
        {
            if (std::this_thread::get_id() == caller_) done_ = now();
        }
        ~Region()
        {
            const int64_t end = now();
            if (end - done_ > std::max(kMinWait, 2 * (done_ - begin_))) stalled(end);
        }

      private:
        const std::thread::id caller_;
        const int64_t begin_;
        int64_t done_;
    };

  private:
    static void stalled(int64_t at)
    {
        const int64_t before = last_.exchange(at, std::memory_order_relaxed);
        /* Soon after the last time alone: the company is still here. */
        const bool again = at - until_.load(std::memory_order_relaxed) < kSoon;
        if (!again && at - before > kSoon) return;
        const int64_t rest = again ? std::min(2 * rest_.load(std::memory_order_relaxed), kLongest) : kFirst;
        rest_.store(rest, std::memory_order_relaxed);
        until_.store(at + rest, std::memory_order_relaxed);
    }

    inline static std::atomic<int64_t> last_{-kLongest}, until_{-kLongest}, rest_{kFirst};
};

using Stalls = StallsBy<steady_now>;

} // namespace gpu_poor

#endif
