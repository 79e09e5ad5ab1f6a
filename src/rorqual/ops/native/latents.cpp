// How a layer's cache holds latents: as engine/cache_formats.py does, to the last bit.

#include <math.h>

#include "bf16.h"
#include "layers.h"

namespace rq {
namespace {

constexpr float E4M3_MAX = 448.0f;
constexpr int64_t Q8_GROUP = 32;

float from_e4m3(uint8_t code) {
    const int exponent = (code >> 3) & 15, fraction = code & 7;
    if (exponent == 15 && fraction == 7) return NAN;
    const float size = exponent ? ldexpf(static_cast<float>(8 + fraction), exponent - 10)
                                : ldexpf(static_cast<float>(fraction), -9);
    return code & 128 ? -size : size;
}

struct E4m3Table {
    float values[256];
    E4m3Table() {
        for (int i = 0; i < 256; i++) values[i] = from_e4m3(static_cast<uint8_t>(i));
    }
};

const float *e4m3_values() {
    static const E4m3Table table;
    return table.values;
}

// To the nearest, ties to even; |x| is at most E4M3_MAX.
uint8_t to_e4m3(float x) {
    const uint8_t sign = signbit(x) ? 128 : 0;
    const float size = fabsf(x);
    if (isnan(x)) return sign | 127;
    if (size < 0.015625f)  // subnormal: steps of 2^-9; 8 of them are the smallest normal number
        return sign | static_cast<uint8_t>(nearbyintf(ldexpf(size, 9)));
    int exponent;
    const float fraction = frexpf(size, &exponent);           // in [0.5, 1)
    int code = static_cast<int>(nearbyintf(ldexpf(fraction, 4)));  // 8 ... 16
    if (code == 16) {
        code = 8;
        exponent++;
    }
    return sign | static_cast<uint8_t>((exponent + 6) << 3 | (code - 8));
}

// The largest magnitude of some values, NaN if there is one: their bits are in that order.
float most_of(const float *x, int64_t num) {
    uint32_t size = 0;
    for (int64_t i = 0; i < num; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        size = bits > size ? bits : size;
    }
    float most;
    memcpy(&most, &size, 4);
    return most;
}

// NaN is no less than anything, and stays.
float at_least(float x, float least) { return x < least ? least : x; }

void write_fp8(const rq_shape &shape, const rq_cache &cache, int64_t place, const float *latent) {
    const int64_t rank = shape.latent_rank;
    const float scale = at_least(most_of(latent, rank) / E4M3_MAX, 1e-12f);
    uint8_t *codes = static_cast<uint8_t *>(cache.planes[0]) + place * rank;
    for (int64_t i = 0; i < rank; i++)
        codes[i] = to_e4m3(fminf(fmaxf(latent[i] / scale, -E4M3_MAX), E4M3_MAX));
    static_cast<float *>(cache.planes[1])[place] = scale;
}

void write_q8(const rq_shape &shape, const rq_cache &cache, int64_t place, const float *latent) {
    const int64_t rank = shape.latent_rank, groups = (rank + Q8_GROUP - 1) / Q8_GROUP;
    int8_t *codes = static_cast<int8_t *>(cache.planes[0]) + place * rank;
    uint16_t *scales = static_cast<uint16_t *>(cache.planes[1]) + place * groups;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * Q8_GROUP, end = first + Q8_GROUP < rank ? first + Q8_GROUP : rank;
        scales[g] = to_bf16(at_least(most_of(latent + first, end - first) / 127.0f, 1e-30f));
        const float scale = from_bf16(scales[g]);
        for (int64_t i = first; i < end; i++) {
            const float code = nearbyintf(latent[i] / scale);
            codes[i] = static_cast<int8_t>(fminf(fmaxf(code, -127.0f), 127.0f));
        }
    }
}

void write_key(const rq_shape &shape, const rq_cache &cache, int64_t place, const float *latent) {
    uint16_t *keys = static_cast<uint16_t *>(cache.planes[2]) + place * shape.rope;
    row_kernels().narrow(latent + shape.latent_rank, shape.rope, keys);
}

}  // namespace

void write_latent(const rq_shape &shape, const rq_cache &cache, int64_t place, const float *latent) {
    const int64_t width = shape.latent_rank + shape.rope;
    switch (cache.kind) {
    case RQ_CACHE_FLOAT32:
        memcpy(static_cast<float *>(cache.planes[0]) + place * width, latent, width * sizeof(float));
        return;
    case RQ_CACHE_BFLOAT16:
        row_kernels().narrow(latent, width, static_cast<uint16_t *>(cache.planes[0]) + place * width);
        return;
    case RQ_CACHE_FP8: write_fp8(shape, cache, place, latent); break;
    default: write_q8(shape, cache, place, latent);
    }
    write_key(shape, cache, place, latent);
}

void read_latents(const rq_shape &shape, const rq_cache &cache, int64_t place, int64_t count,
                  float *latents) {
    const int64_t rank = shape.latent_rank, width = rank + shape.rope;
    const int64_t groups = (rank + Q8_GROUP - 1) / Q8_GROUP;
    for (int64_t i = place; i < place + count; i++, latents += width) {
        if (cache.kind == RQ_CACHE_FLOAT32) {
            memcpy(latents, static_cast<const float *>(cache.planes[0]) + i * width,
                   width * sizeof(float));
            continue;
        }
        if (cache.kind == RQ_CACHE_BFLOAT16) {
            row_kernels().widen(static_cast<const uint16_t *>(cache.planes[0]) + i * width, width,
                                latents);
            continue;
        }
        if (cache.kind == RQ_CACHE_FP8) {
            const uint8_t *codes = static_cast<const uint8_t *>(cache.planes[0]) + i * rank;
            const float scale = static_cast<const float *>(cache.planes[1])[i];
            const float *values = e4m3_values();
            for (int64_t k = 0; k < rank; k++) latents[k] = values[codes[k]] * scale;
        } else {
            const int8_t *codes = static_cast<const int8_t *>(cache.planes[0]) + i * rank;
            const uint16_t *scales = static_cast<const uint16_t *>(cache.planes[1]) + i * groups;
            for (int64_t g = 0; g < groups; g++) {
                const int64_t at = g * Q8_GROUP;
                const int64_t num = rank - at < Q8_GROUP ? rank - at : Q8_GROUP;
                row_kernels().scale_codes(codes + at, from_bf16(scales[g]), num, latents + at);
            }
        }
        row_kernels().widen(static_cast<const uint16_t *>(cache.planes[2]) + i * shape.rope,
                            shape.rope, latents + rank);
    }
}

}  // namespace rq
