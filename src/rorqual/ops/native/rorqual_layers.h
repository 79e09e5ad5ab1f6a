/* Whole layers of the model in one call: the C interface that Python calls, without its lock.
 *
 * Matrices are packed stacks (rorqual_native.h). Hidden states, norms and all sums are float32.
 */
#ifndef RORQUAL_LAYERS_H
#define RORQUAL_LAYERS_H

#include "rorqual_native.h"

#ifdef __cplusplus
extern "C" {
#endif

/* num matrices (rows, columns), packed one after the other; num = 0: there is none. */
typedef struct {
    int64_t kind, num, rows, columns;
    const uint8_t *packed;
} rq_stack;

typedef struct {
    int64_t hidden, heads, query_rank, latent_rank, rope, nope, value;
    int64_t experts, chosen, groups, kept_groups; /* groups = 0: no choice by groups */
    int64_t best_of_group;                        /* whose scores make a group's */
    int64_t is_softmax, is_normalised;
    double eps, latent_eps, softmax_scale, routed_scale;
} rq_shape;

/* Without query_a, query_b maps hidden states to queries. Shared experts are gate, up and down; in
 * a dense layer they are all there is, and experts are none. */
typedef struct {
    const float *input_norm, *query_norm, *latent_norm, *mlp_norm, *router_bias;
    rq_stack query_a, query_b, latent_a, keys, values, output;
    rq_stack router, gate, up, down;
    rq_stack expert_gate, expert_up, expert_down;
} rq_layer;

enum rq_cache_kind { RQ_CACHE_FLOAT32 = 0, RQ_CACHE_BFLOAT16 = 1, RQ_CACHE_FP8 = 2, RQ_CACHE_Q8 = 3 };

/* A layer's latents: slots one after the other. FP8: codes, a float32 scale a slot, rotary keys in
 * bfloat16; Q8: codes, a bfloat16 scale for each 32, rotary keys in bfloat16. */
typedef struct {
    int64_t kind;
    void *planes[3];
} rq_cache;

/* The next num_tokens tokens of a step: the first is in slot `start` of its sequence, which they
 * see from slot `first` on. The blocks of slots are tables[table], tables[table + 1] ... */
typedef struct {
    int64_t num_tokens, start, first, table, is_absorbed;
} rq_span;

/* cos and sin (num_tokens, rope / 2); places: where in the cache each token's latent goes. */
typedef struct {
    int64_t num_tokens, num_spans, block_tokens;
    const float *cos, *sin;
    const int64_t *places, *tables;
    const rq_span *spans;
} rq_step;

enum rq_part { RQ_ROWS = 0, RQ_MATRIX = 1, RQ_ATTENTION = 2, RQ_EXPERTS = 3, RQ_ROUTING = 4, RQ_PARTS = 5 };

typedef struct rq_layers rq_layers;

/* What the layers point to must outlive them. NULL where memory is short. */
RQ_API rq_layers *rq_layers_make(const rq_shape *shape, const rq_layer *layers, int64_t num_layers);
RQ_API void rq_layers_free(rq_layers *layers);

/* x (num_tokens, hidden) through all layers, in place, and through the norm of weights `norm` and
 * epsilon `eps` if that is not NULL. One cache a layer. */
RQ_API int rq_layers_run(rq_layers *layers, const rq_cache *caches, const rq_step *step,
                         const float *norm, double eps, float *x);

/* Seconds that the calling threads spent in kernels of each rq_part since the last call. */
RQ_API void rq_take_seconds(double *seconds);

#ifdef __cplusplus
}
#endif
#endif
