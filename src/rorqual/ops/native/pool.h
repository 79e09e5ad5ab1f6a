/* Threads that wait for work in a spin, and sleep when none comes. */
#ifndef RORQUAL_POOL_H
#define RORQUAL_POOL_H

#include <stdint.h>

namespace rq {

void set_threads(int num_threads);
int num_threads();

// Calls work(context, first, last) on all threads, which share [0, count) evenly; returns when all
// is done. One caller at a time: others wait.
using Work = void (*)(void *context, int64_t first, int64_t last);
void parallel(Work work, void *context, int64_t count);

}  // namespace rq
#endif
