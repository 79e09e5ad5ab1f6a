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
 * see from slot `first` on, and at the rotary position `position`. The blocks of slots are
 * tables[table], tables[table + 1] ... */
typedef struct {
    int64_t num_tokens, start, first, position, table, is_absorbed;
} rq_span;

/* What stands before the layers and behind them. x is a token's row of `embedding`; in an MTP module,
 * which has `joint` (hidden, 2 * hidden), joint times that row and the token's state, each normed.
 * Behind: the last norm, and the head. Without one of these stacks its part is the caller's. */
typedef struct {
    rq_stack embedding, joint, head;
    const float *embedding_norm, *state_norm, *last_norm;
} rq_ends;

/* Tokens of some spans, one span after the other. Without ids, `hidden` holds the embedding's rows.
 * cos and sin (num_positions, rope / 2) are of all rotary positions. */
typedef struct {
    int64_t num_threads, num_tokens, num_spans, block_tokens, num_positions;
    const int64_t *ids, *tables;
    const rq_span *spans;
    const float *cos, *sin;
    const float *states; /* (num_tokens, hidden), if there is `joint` */
    float *hidden;       /* (num_tokens, hidden): what comes of it */
    /* Tokens, in ascending order, whose logits are wanted; (num_rows, head.rows), or NULL. */
    int64_t num_rows;
    const int64_t *rows;
    float *logits;
    /* Of each row the likeliest of the first num_ids tokens, the lowest of equal ones; -1 where a
     * logit is no finite number. NULL: not wanted. */
    int64_t num_ids;
    int64_t *likeliest;
} rq_step;

enum rq_part { RQ_ROWS = 0, RQ_MATRIX = 1, RQ_ATTENTION = 2, RQ_EXPERTS = 3, RQ_ROUTING = 4, RQ_PARTS = 5 };

typedef struct rq_layers rq_layers;

/* What the layers point to must outlive them. NULL where memory is short. */
RQ_API rq_layers *rq_layers_make(const rq_shape *shape, const rq_ends *ends, const rq_layer *layers,
                                 int64_t num_layers);
RQ_API void rq_layers_free(rq_layers *layers);

/* A step through all of it. One cache a layer. RQ_BAD_SHAPE, with nothing done: no tokens, ids that
 * the embedding does not have, positions beyond the angles, rows or spans that do not fit. */
RQ_API int rq_layers_run(rq_layers *layers, const rq_cache *caches, const rq_step *step);

/* Seconds that the calling threads spent in kernels of each rq_part since the last call. */
RQ_API void rq_take_seconds(double *seconds);

#ifdef __cplusplus
}
#endif
#endif
