/* Threads that wait for work. */
#ifndef RORQUAL_POOL_H
#define RORQUAL_POOL_H

#include <stdint.h>

namespace rq {

using Work = void (*)(void *context, int64_t first, int64_t last);

// Splits items [0, count) between the threads, the caller's among them. One call at a time has the
// threads; another waits. False: a thread lacked memory, and its share is not done.
bool parallel(Work work, void *context, int64_t count);

// work(context, i, n) on n threads at once, i of each below n, which is at most `most`. It throws
// nothing.
void run_team(Work work, void *context, int64_t most);

int num_threads();

void set_threads(int num_threads);

// Seconds spent in kernels, for each rq_part.
void add_seconds(const double *seconds);

}  // namespace rq
#endif
