// Work on rows for processors with AVX-512 and its bfloat16 products.

#include <math.h>

#include "bf16.h"
#include "formats.h"
#include "vector.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#include <immintrin.h>

namespace rq {
namespace avx512 {

struct Vec {
    __m512 v;
    static constexpr bool HAS_BF16 = true;
    static constexpr int HEADS = 16;  // whose sums fit the registers
    static constexpr int PAIR_HEADS = 8, PAIR_COLUMNS = 32;

    static Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
    void store(float *p) const { _mm512_storeu_ps(p, v); }
    static Vec add(Vec x, Vec y) { return {_mm512_add_ps(x.v, y.v)}; }
    static Vec sub(Vec x, Vec y) { return {_mm512_sub_ps(x.v, y.v)}; }
    static Vec mul(Vec x, Vec y) { return {_mm512_mul_ps(x.v, y.v)}; }
    static Vec div(Vec x, Vec y) { return {_mm512_div_ps(x.v, y.v)}; }
    static Vec max(Vec x, Vec y) { return {_mm512_max_ps(x.v, y.v)}; }
    static Vec fma(Vec x, Vec y, Vec z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
    float sum() const { return _mm512_reduce_add_ps(v); }
    // 2^n e^r with |r| <= ln 2 / 2; within 2 units in the last place, 0 below and inf above. NaN
    // stays: the instructions give their second operand then.
    static Vec exp(Vec x) {
        const __m512 low = _mm512_set1_ps(-104.0f), high = _mm512_set1_ps(89.0f);
        const __m512 y = _mm512_min_ps(high, _mm512_max_ps(low, x.v));
        const __m512 n = _mm512_roundscale_ps(
            _mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), y);
        r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
        __m512 p = _mm512_set1_ps(1.9875691500e-4f);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
        p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
        return {_mm512_scalef_ps(p, n)};
    }
    static __m256i halves(const uint16_t *p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    }
    static Vec load_bf16(const uint16_t *p) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(p)), 16))};
    }
    void store_bf16(uint16_t *p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), (__m256i)_mm512_cvtneps_pbh(v));
    }
    static __m512i wide(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }
    static void store_pairs(uint32_t *p, Vec first, Vec second) {
        _mm512_storeu_si512(p, _mm512_or_si512(wide(first.v), _mm512_slli_epi32(wide(second.v), 16)));
    }
    // 32 columns of 8 heads: fewer words are read for a product than of 16 and 16. A line of `next`
    // is asked for with each pair of rows: many at once would be waited for.
    static void sum_pairs(const uint32_t *weights, const uint16_t *values, int64_t stride,
                          int64_t count, int64_t width, float *out, const uint16_t *next) {
        __m512 low[PAIR_HEADS], high[PAIR_HEADS];  // columns 0 to 3 and 4 to 7 of each 8
#pragma GCC unroll 8
        for (int r = 0; r < PAIR_HEADS; r++) {
            const __m512 a = _mm512_loadu_ps(out + r * width), b = _mm512_loadu_ps(out + r * width + 16);
            low[r] = _mm512_shuffle_f32x4(a, b, 0x88);
            high[r] = _mm512_shuffle_f32x4(a, b, 0xdd);
        }
        for (int64_t s = 0; s < count; s += 2) {
            if (next) __builtin_prefetch(next + s * LANES, 0, 2);
            const int64_t following = s + 1 < count ? s + 1 : s;  // its weight is zero
            const __m512i first = _mm512_loadu_si512(values + s * stride);
            const __m512i second = _mm512_loadu_si512(values + following * stride);
            const __m512bh l = (__m512bh)_mm512_unpacklo_epi16(first, second);
            const __m512bh h = (__m512bh)_mm512_unpackhi_epi16(first, second);
            const uint32_t *w = weights + s / 2 * LANES;
#pragma GCC unroll 8
            for (int r = 0; r < PAIR_HEADS; r++) {
                const __m512bh by = (__m512bh)_mm512_set1_epi32(static_cast<int>(w[r]));
                low[r] = _mm512_dpbf16_ps(low[r], by, l);
                high[r] = _mm512_dpbf16_ps(high[r], by, h);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < PAIR_HEADS; r++) {
            const __m512 a = _mm512_shuffle_f32x4(low[r], high[r], 0x44);
            const __m512 b = _mm512_shuffle_f32x4(low[r], high[r], 0xee);
            _mm512_storeu_ps(out + r * width, _mm512_shuffle_f32x4(a, a, 0xd8));
            _mm512_storeu_ps(out + r * width + 16, _mm512_shuffle_f32x4(b, b, 0xd8));
        }
    }
};

#include "rows.inl"

}  // namespace avx512

}  // namespace rq
#endif
