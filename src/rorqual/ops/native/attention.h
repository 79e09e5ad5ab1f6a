/* What both forms of attention use. */
#ifndef RORQUAL_ATTENTION_H
#define RORQUAL_ATTENTION_H

#include "bf16.h"
#include "layers.h"

namespace rq {

// Cached latents of neighbouring slots, as rows of bfloat16 or of floats.
struct Latents {
    bool is_narrow;
    const uint16_t *pairs;
    const float *floats;

    // The first `width` values of rows that lie `stride` values apart.
    Activations view(int64_t width, int64_t stride) const {
        Activations x{};
        x.pairs = pairs;
        x.floats = floats;
        x.width = width;
        x.stride = stride;
        return x;
    }
};

// In which numbers attention over such a cache is computed.
inline bool computes_narrow(const rq_cache &cache) {
    return row_kernels().has_bf16 && cache.kind != RQ_CACHE_FLOAT32;
}

// `num` latents from a slot on: in place where they lie together in these numbers, else in the
// thread's memory. So sums do not depend on which blocks a sequence was given.
Latents latents_from(const Call &c, Scratch &scratch, const rq_cache &cache, const rq_span &span,
                     int64_t slot, int64_t num);

void reserve_expanded(const rq_shape &shape, Scratch &scratch, int64_t num_queries);

// One head's attention for all tokens of a span: its keys and values are made of the latents, some
// at a time.
void attend_expanded(const Call &c, Scratch &scratch, const rq_layer &layer, const rq_cache &cache,
                     int64_t span, int64_t head);

}  // namespace rq
#endif
