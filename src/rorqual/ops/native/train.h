/* What a training step asks of the kernels: a struct for each operation, whose items threads share.
 * `rq_train` takes them; `ops/native/training.py` has the same structs in the same order. */
#ifndef RORQUAL_TRAIN_H
#define RORQUAL_TRAIN_H

#include <stdint.h>

#include "formats.h"
#include "rorqual_native.h"

namespace rq {

// Rows of float32 or bfloat16, `stride` values from one to the next. `p` NULL: there are none.
struct Rows {
    void *p;
    int64_t stride, is_half;
};

enum Operation {
    NORM, NORM_GRAD, SWIGLU, SWIGLU_GRAD, GATHER, SCATTER, SORT, CROSS_ENTROPY,
    ROUTE, ROUTE_GRAD, ATTEND, ATTEND_GRAD, ROPE_GRAD, NUM_OPERATIONS,
};

// A row an item: sum = x + add, y = sum / rms(sum) * weight, and y again in other's dtype.
struct Norm {
    Rows x, add, sum, y, other;
    const float *weight;
    float *rstd;
    int64_t width;
    double eps;
};

// NORM_ROWS rows an item: x is what was normed, dx its gradient, dsum's included; dweight (items,
// width) are sums over the item's rows.
constexpr int64_t NORM_ROWS = 64;
struct NormGrad {
    Rows dy, dother, dsum, x, dx;
    const float *weight, *rstd;
    float *dweight;
    int64_t width, num_rows;
};

// A row an item: out = silu(gate) * up * by. `by` NULL: one.
struct Swiglu {
    Rows gate, up, out;
    const float *by;
    int64_t width;
};

// The gradients of gate, up and by; `inner` is given what SWIGLU's out was.
struct SwigluGrad {
    Rows gate, up, dout, dgate, dup, inner;
    const float *by;
    float *dby;
    int64_t width;
};

// A row an item. GATHER: out[i] = x[index[i] / num], zeros for an index below 0; SCATTER:
// out[index[i] / num] += x[i], where no two of the indices are one and those below 0 are none.
struct Move {
    Rows x, out;
    const int64_t *index;
    int64_t num, width;
};

// One item: the stable order of `num` pairs by their expert, and how many each has: with -1 for as
// many as make this number a multiple of `whole`, behind its own.
struct Sort {
    const int64_t *experts;
    int64_t *order, *counts;
    int64_t num, num_experts, whole;
};

// A row an item: its loss, and logits become their gradient. An unmarked row counts zero, and
// the loss of a target that is no column is NaN.
struct CrossEntropy {
    Rows logits;
    const int64_t *targets;
    const uint8_t *marks;
    float *losses;
    int64_t width;
};

// A token an item. best_of_group: how many scores make a group's; 0: all groups are kept.
// ROUTE_GRAD writes dlogits, of dweights and dscores (NULL: none).
struct Route {
    const float *logits, *bias, *dweights, *dscores;
    float *weights, *scores, *dlogits;
    int64_t *experts;
    int64_t num_experts, num_chosen, num_groups, kept_groups, best_of_group;
    int64_t is_softmax, is_normalised;
    double scale;
};

// A head of a sequence an item. q (B T, H (N + R)), not yet rotated; kv (B T, H (N + V)): keys'
// first parts and values; rope (B T, R): the keys' last part, not yet rotated, the same for all
// heads. Angles (T, R / 2), `angles` of a sequence after those of the one before, 0: the same.
// With documents a token sees those of its own number alone. lse (B, H, T).
// The gradients: dq, dkv, and drope (B, H, T, R) for each head, before it is rotated back; ROPE_GRAD
// sums the heads' and rotates, a token an item, into `rope`.
struct Attend {
    Rows q, kv, rope, out, dout, dq, dkv;
    const float *cos, *sin;
    const int64_t *documents;
    float *lse, *drope;
    int64_t num_tokens, num_heads, nope, turned, value, angles;
    double scale;
};

}  // namespace rq
#endif
