/* Work on rows of float32, written once (rows.inl) for each instruction set. */
#ifndef RORQUAL_VECTOR_H
#define RORQUAL_VECTOR_H

#include <stdint.h>

namespace rq {

constexpr int LANES = 16;

struct RowKernels {
    // Whether products of bfloat16 pairs are faster than those of floats.
    bool has_bf16;
    // y = x / rms(x) * weight
    void (*rms_norm)(const float *x, const float *weight, float eps, int64_t n, float *y);
    // y = silu(gate) * up * by
    void (*swiglu)(const float *gate, const float *up, float by, int64_t n, float *y);
    void (*narrow)(const float *x, int64_t n, uint16_t *y);
    void (*widen)(const uint16_t *x, int64_t n, float *y);
    // y += x * by
    void (*add)(const float *x, float by, int64_t n, float *y);
    // Scores (count, LANES), `stride` floats a row, become weights exp(score - most). `most`, of
    // LANES, is updated; `total` too, after it was brought to the new `most` by `change`.
    void (*weigh)(float *scores, int64_t stride, int64_t count, float *most, float *total,
                  float *change);
    // Two rows of 16 floats become 16 pairs of bfloat16, for pairs of the rows of x; a last row
    // without another is paired with zeros.
    void (*pair)(const float *x, int64_t stride, int64_t count, uint32_t *pairs);
    // y (rows, LANES), `stride` floats a row, times `by`, of LANES
    void (*scale)(float *y, int64_t stride, int64_t rows, const float *by);
    // out (LANES, width) += weights^T (count, LANES) times rows of values (count, width), which are
    // `stride` values apart.
    void (*sum_floats)(const float *weights, const float *values, int64_t stride, int64_t count,
                       int64_t width, float *out);
    // `next`, if not NULL, is memory of count * width values that is asked for meanwhile.
    void (*sum_pairs)(const uint32_t *weights, const uint16_t *values, int64_t stride, int64_t count,
                      int64_t width, float *out, const uint16_t *next);
    // Codes of 8 bits times a scale.
    void (*scale_codes)(const int8_t *codes, float scale, int64_t n, float *y);
};

const RowKernels &row_kernels();

}  // namespace rq
#endif
