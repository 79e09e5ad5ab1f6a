#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace rq {
namespace {

// Choice: about 50 us, longer than what a decode step does between two products.
constexpr int SPINS = 20000;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

class Pool {
  public:
    explicit Pool(int num_threads) : num_threads_(num_threads) {
        for (int i = 1; i < num_threads; i++) workers_.emplace_back([this, i] { serve(i); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            is_closed_ = true;
            turn_.fetch_add(1);
        }
        wake_.notify_all();
        for (std::thread &worker : workers_) worker.join();
    }

    int size() const { return num_threads_; }

    void run(Work work, void *context, int64_t count) {
        if (num_threads_ == 1 || count < 2) {
            work(context, 0, count);
            return;
        }
        work_ = work;
        context_ = context;
        count_ = count;
        num_busy_.store(num_threads_ - 1, std::memory_order_relaxed);
        turn_.fetch_add(1);
        if (num_asleep_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        take_share(0);
        while (num_busy_.load(std::memory_order_acquire) > 0) pause();
    }

  private:
    void take_share(int i) {
        const int64_t first = count_ * i / num_threads_, last = count_ * (i + 1) / num_threads_;
        if (first < last) work_(context_, first, last);
    }

    void serve(int i) {
        uint64_t seen = 0;
        for (;;) {
            seen = wait_beyond(seen);
            if (is_closed_) return;
            take_share(i);
            num_busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    uint64_t wait_beyond(uint64_t seen) {
        for (int i = 0; i < SPINS; i++) {
            const uint64_t turn = turn_.load(std::memory_order_acquire);
            if (turn != seen) return turn;
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        num_asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return turn_.load() != seen; });
        num_asleep_.fetch_sub(1);
        return turn_.load();
    }

    const int num_threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> turn_{0};
    std::atomic<int> num_asleep_{0}, num_busy_{0};
    std::atomic<bool> is_closed_{false};
    Work work_ = nullptr;
    void *context_ = nullptr;
    int64_t count_ = 0;
};

std::mutex callers;
std::unique_ptr<Pool> pool;

// A fork copies no threads: the child makes its own.
void forget() {
    pool.release();
    new (&callers) std::mutex;
}

Pool &the_pool() {
    if (!pool) {
#if defined(__unix__) || defined(__APPLE__)
        static const int once = pthread_atfork(nullptr, nullptr, forget);
        (void)once;
#endif
        pool.reset(new Pool(1));
    }
    return *pool;
}

}  // namespace

void set_threads(int num_threads) {
    std::lock_guard<std::mutex> lock(callers);
    if (the_pool().size() != num_threads) pool.reset(new Pool(num_threads < 1 ? 1 : num_threads));
}

int num_threads() {
    std::lock_guard<std::mutex> lock(callers);
    return the_pool().size();
}

void parallel(Work work, void *context, int64_t count) {
    std::lock_guard<std::mutex> lock(callers);
    the_pool().run(work, context, count);
}

}  // namespace rq
