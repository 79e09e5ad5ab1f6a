#include "pool.h"

#include "rorqual_layers.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
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
    // Fewer threads where the system grants no more.
    explicit Pool(int wanted) : wanted_(wanted), num_threads_(1) {
        workers_.reserve(wanted);
        try {
            for (; num_threads_ < wanted; num_threads_++)
                workers_.emplace_back([this, i = num_threads_] { serve(i); });
        } catch (const std::system_error &) {
        }
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

    int wanted() const { return wanted_; }

    void run(Work work, void *context, int64_t count) {
        if (num_threads_ == 1 || count < 2)
            work(context, 0, count);
        else
            begin(work, context, count, num_threads_);
    }

    // Share i of n is item i, and n what the work is told for an end.
    void run_team(Work work, void *context, int most) {
        struct Team {
            Work work;
            void *context;
            int64_t size;
        } team{work, context, most < num_threads_ ? most : num_threads_};
        const auto one = [](void *shared, int64_t i, int64_t) {
            const Team &t = *static_cast<Team *>(shared);
            t.work(t.context, i, t.size);
        };
        if (team.size == 1)
            one(&team, 0, 1);
        else
            begin(one, &team, team.size, static_cast<int>(team.size));
    }

  private:
    void begin(Work work, void *context, int64_t count, int num_shares) {
        num_shares_ = num_shares;
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

    void take_share(int i) {
        if (i >= num_shares_) return;
        const int64_t first = count_ * i / num_shares_, last = count_ * (i + 1) / num_shares_;
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

    const int wanted_;
    int num_threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> turn_{0};
    std::atomic<int> num_asleep_{0}, num_busy_{0};
    std::atomic<bool> is_closed_{false};
    Work work_ = nullptr;
    void *context_ = nullptr;
    int64_t count_ = 0;
    int num_shares_ = 1;
};

std::mutex callers, seconds_mutex;
double seconds_of[RQ_PARTS];
std::unique_ptr<Pool> pool;
int wanted = 1;

// libgomp's threads, which torch computes on. A second set would take the processors from them.
struct OpenMp {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr, (*num_threads)() = nullptr;
} omp;

// A fork copies no threads: the child makes its own.
void forget() {
    pool.release();
    omp = OpenMp();
    new (&callers) std::mutex;
    new (&seconds_mutex) std::mutex;
}

Pool &the_pool() {
    if (!pool || pool->wanted() != wanted) pool.reset(new Pool(wanted));
    return *pool;
}

// What a thread throws would end the process, or cross the C interface.
struct Guarded {
    Work work;
    void *context;
    std::atomic<bool> lacks_memory{false};

    static void run(void *shared, int64_t first, int64_t last) {
        Guarded &g = *static_cast<Guarded *>(shared);
        try {
            g.work(g.context, first, last);
        } catch (const std::bad_alloc &) {
            g.lacks_memory.store(true);
        }
    }
};

struct Region {
    Work work;
    void *context;
    int64_t count;
    bool is_team;
};

void enter(void *shared) {
    const Region &r = *static_cast<Region *>(shared);
    const int64_t i = omp.thread_num(), n = omp.num_threads();
    if (r.is_team)
        r.work(r.context, i, n);
    else if (r.count * i / n < r.count * (i + 1) / n)
        r.work(r.context, r.count * i / n, r.count * (i + 1) / n);
}

}  // namespace

void set_threads(int num_threads) {
    std::lock_guard<std::mutex> lock(callers);
#if defined(__unix__) || defined(__APPLE__)
    static const int once = pthread_atfork(nullptr, nullptr, forget);
    (void)once;
#endif
    wanted = num_threads < 1 ? 1 : num_threads;
}

int num_threads() {
    std::lock_guard<std::mutex> lock(callers);
    return wanted;
}

bool parallel(Work work, void *context, int64_t count) {
    std::lock_guard<std::mutex> lock(callers);
    Guarded guarded{work, context};
    if (wanted == 1 || count < 2) {
        Guarded::run(&guarded, 0, count);
    } else if (omp.parallel) {
        Region region{Guarded::run, &guarded, count, false};
        omp.parallel(enter, &region, static_cast<unsigned>(wanted), 0);
    } else {
        the_pool().run(Guarded::run, &guarded, count);
    }
    return !guarded.lacks_memory.load();
}

void run_team(Work work, void *context, int64_t most) {
    std::lock_guard<std::mutex> lock(callers);
    const int size = most < wanted ? static_cast<int>(most) : wanted;
    if (size == 1) {
        work(context, 0, 1);
    } else if (omp.parallel) {
        Region region{work, context, 0, true};
        omp.parallel(enter, &region, static_cast<unsigned>(size), 0);
    } else {
        the_pool().run_team(work, context, size);
    }
}

void add_seconds(const double *seconds) {
    std::lock_guard<std::mutex> lock(seconds_mutex);
    for (int i = 0; i < RQ_PARTS; i++) seconds_of[i] += seconds[i];
}

}  // namespace rq

extern "C" void rq_take_seconds(double *seconds) {
    std::lock_guard<std::mutex> lock(rq::seconds_mutex);
    for (int i = 0; i < RQ_PARTS; i++) {
        seconds[i] = rq::seconds_of[i];
        rq::seconds_of[i] = 0;
    }
}

extern "C" void rq_use_openmp(void *parallel, void *thread_num, void *num_threads) {
    std::lock_guard<std::mutex> lock(rq::callers);
    rq::omp.parallel = reinterpret_cast<void (*)(void (*)(void *), void *, unsigned, unsigned)>(parallel);
    rq::omp.thread_num = reinterpret_cast<int (*)()>(thread_num);
    rq::omp.num_threads = reinterpret_cast<int (*)()>(num_threads);
}
