// Work on rows for processors with AVX2, FMA and F16C.

#include <math.h>

#include "bf16.h"
#include "formats.h"
#include "vector.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

namespace rq {
namespace avx2 {

struct Vec {
    __m256 a, b;
    static constexpr bool HAS_BF16 = false;
    static constexpr int HEADS = 4;  // whose sums fit the registers
    static constexpr int PAIR_HEADS = HEADS, PAIR_COLUMNS = LANES;

    static Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Vec load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    void store(float *p) const {
        _mm256_storeu_ps(p, a);
        _mm256_storeu_ps(p + 8, b);
    }
    static Vec add(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static Vec sub(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static Vec mul(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static Vec div(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    static Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static Vec fma(Vec x, Vec y, Vec z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    float sum() const {
        const __m256 both = _mm256_add_ps(a, b);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }
    // As on AVX-512; 2^n in two factors, since n reaches -150.
    static __m256 exp_of(__m256 x) {
        const __m256 y =
            _mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(_mm256_set1_ps(-104.0f), x));
        const __m256 n = _mm256_round_ps(_mm256_mul_ps(y, _mm256_set1_ps(1.44269504f)),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), y);
        r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
        __m256 p = _mm256_set1_ps(1.9875691500e-4f);
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
        p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
        const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
        p = _mm256_mul_ps(p, power(half));
        return _mm256_mul_ps(p, power(_mm256_sub_epi32(whole, half)));
    }
    static __m256 power(__m256i n) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }
    static Vec exp(Vec x) { return {exp_of(x.a), exp_of(x.b)}; }
    static __m256 wide(const uint16_t *p) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
    }
    static Vec load_bf16(const uint16_t *p) { return {wide(p), wide(p + 8)}; }
    void store_bf16(uint16_t *p) const {
        float f[LANES];
        store(f);
        for (int i = 0; i < LANES; i++) p[i] = to_bf16(f[i]);
    }
    static void store_pairs(uint32_t *p, Vec first, Vec second) {
        float f[LANES], s[LANES];
        first.store(f);
        second.store(s);
        for (int i = 0; i < LANES; i++) p[i] = to_bf16(f[i]) | static_cast<uint32_t>(to_bf16(s[i])) << 16;
    }
    static void sum_pairs(const uint32_t *weights, const uint16_t *values, int64_t stride,
                          int64_t count, int64_t width, float *out, const uint16_t *) {
        Vec acc[HEADS];
        for (int r = 0; r < HEADS; r++) acc[r] = load(out + r * width);
        for (int64_t s = 0; s < count; s++) {
            const Vec value = load_bf16(values + s * stride);
            for (int r = 0; r < HEADS; r++) {
                const uint32_t both = weights[s / 2 * LANES + r];
                const float w = from_bf16(static_cast<uint16_t>(s % 2 ? both >> 16 : both));
                acc[r] = fma(all(w), value, acc[r]);
            }
        }
        for (int r = 0; r < HEADS; r++) acc[r].store(out + r * width);
    }
};

#include "rows.inl"

}  // namespace avx2

}  // namespace rq
#endif
