/* Threads that go through a computation of many phases together. */
#ifndef RORQUAL_TEAM_H
#define RORQUAL_TEAM_H

#include <stdint.h>

#include <atomic>
#include <chrono>
#include <new>
#include <thread>

#include "pool.h"
#include "rorqual_layers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rq {

constexpr int MOST_THREADS = 256;

// What the threads of one computation share.
struct Team {
    // Of each thread's items, those that were taken.
    struct alignas(64) Taken {
        std::atomic<int64_t> num{0};
    } taken[MOST_THREADS];
    alignas(64) std::atomic<int> num_arrived{0};
    alignas(64) std::atomic<uint32_t> phase{0};
    std::atomic<bool> lacks_memory{false};
    double seconds[RQ_PARTS] = {};
};

// One thread of a team.
class Worker {
  public:
    Worker(Team &team, int index, int size) : team_(team), index_(index), size_(size) {}

    int index() const { return index_; }
    int size() const { return size_; }

    // The first item that this thread takes of so many, one after the other.
    int64_t first_of(int64_t count, int index) const { return count * index / size_; }
    int64_t first_of(int64_t count) const { return first_of(count, index_); }

    // f(i) for i below count; then all wait for each other. Each thread has neighbouring items, and
    // takes what is left of others' when it is done with its own. Once a thread lacked memory
    // nothing more is done, but all still meet after each phase.
    template <class F>
    void each(rq_part part, int64_t count, F f) {
        const auto start = now();
        try {
            if (!team_.lacks_memory.load(std::memory_order_relaxed)) do_items(count, f);
        } catch (const std::bad_alloc &) {
            team_.lacks_memory.store(true, std::memory_order_relaxed);
        }
        if (index_ == 0)
            team_.seconds[part] += std::chrono::duration<double>(now() - start).count();
        wait();
    }

    // Asks for memory that is read next.
    static void fetch(const uint8_t *p, int64_t num_bytes) {
        for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
    }

  private:
    // Choice: about 100 us, after which the processor is given to others.
    static constexpr int SPINS = 2000;

    template <class F>
    void do_items(int64_t count, F &f) {
        if (size_ == 1)
            for (int64_t i = 0; i < count; i++) f(i);
        else
            for (int k = 0; k < size_; k++) take_of((index_ + k) % size_, count, f);
    }

    template <class F>
    void take_of(int index, int64_t count, F &f) {
        const int64_t first = first_of(count, index), num = first_of(count, index + 1) - first;
        std::atomic<int64_t> &taken = team_.taken[index].num;
        if (taken.load(std::memory_order_relaxed) >= num) return;
        for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < num;) f(first + i);
    }

    static std::chrono::steady_clock::time_point now() { return std::chrono::steady_clock::now(); }

    void wait() {
        if (size_ == 1) return;
        const uint32_t phase = team_.phase.load(std::memory_order_relaxed);
        if (team_.num_arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            for (int i = 0; i < size_; i++) team_.taken[i].num.store(0, std::memory_order_relaxed);
            team_.num_arrived.store(0, std::memory_order_relaxed);
            team_.phase.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; team_.phase.load(std::memory_order_acquire) == phase; i++) {
            if (i < SPINS)
                relax();
            else
                std::this_thread::yield();
        }
    }

    static void relax() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    Team &team_;
    const int index_, size_;
};

// work(worker) in at most so many threads at once. False: one of them lacked memory.
template <class F>
bool together(int most, F work) {
    struct Context {
        Team team;
        F &work;
    } context{Team(), work};
    run_team(
        [](void *shared, int64_t index, int64_t size) {
            Context &c = *static_cast<Context *>(shared);
            Worker worker(c.team, static_cast<int>(index), static_cast<int>(size));
            c.work(worker);
        },
        &context, most < MOST_THREADS ? most : MOST_THREADS);
    add_seconds(context.team.seconds);
    return !context.team.lacks_memory.load();
}

}  // namespace rq
#endif
