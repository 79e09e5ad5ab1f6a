/* What the encoders of GGUF's block types share with each other and with `rq_encode`. */
#ifndef RORQUAL_ENCODE_H
#define RORQUAL_ENCODE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace rq {

// As ggml numbers its types.
enum Type {
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8,
    Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
};

// Rows of values that lie one after the other, and where their blocks go.
struct Encoding {
    int type;
    const float *x;
    uint8_t *blocks;
    int64_t num_rows, num_columns;
    const float *importance;  // of each column, or null
};

// To the nearest, ties to even (Maratyszcza's fp16, as in ggml and torch).
static inline uint16_t half_bits(float f) {
    uint32_t bits, base_bits;
    memcpy(&bits, &f, 4);
    float size;
    const uint32_t size_bits = bits & 0x7fffffff;
    memcpy(&size, &size_bits, 4);
    float base = size * 0x1p112f * 0x1p-110f;
    const uint32_t twice = bits + bits;
    uint32_t bias = twice & 0xff000000;
    if (bias < 0x71000000) bias = 0x71000000;
    const uint32_t shift_bits = (bias >> 1) + 0x07800000;
    float shift;
    memcpy(&shift, &shift_bits, 4);
    base = shift + base;
    memcpy(&base_bits, &base, 4);
    const uint32_t number = ((base_bits >> 13) & 0x7c00) + (base_bits & 0x0fff);
    return static_cast<uint16_t>(((bits >> 16) & 0x8000) | (twice > 0xff000000 ? 0x7e00 : number));
}

static inline float wide_half(uint16_t h) {
    const uint32_t exponent = (h >> 10) & 31, fraction = h & 1023;
    uint32_t bits = ((exponent + 112) << 23) | (fraction << 13);
    if (exponent == 31) bits |= 0x7f800000;
    float f;
    memcpy(&f, &bits, 4);
    if (exponent == 0) f = static_cast<float>(fraction) * 0x1p-24f;
    return h & 0x8000 ? -f : f;
}

static inline bool is_finite_half(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

}  // namespace rq
#endif
