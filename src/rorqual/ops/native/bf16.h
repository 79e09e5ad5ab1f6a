/* bfloat16, one value at a time. */
#ifndef RORQUAL_BF16_H
#define RORQUAL_BF16_H

#include <stdint.h>
#include <string.h>

namespace rq {

static inline float from_bf16(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// To the nearest, ties to even; no NaN becomes an infinity.
static inline uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16) | 64;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace rq
#endif
