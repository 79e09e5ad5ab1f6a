// Kernels for processors with AVX2, FMA and F16C.

#include "formats.h"

#ifdef RQ_X86
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#include <string.h>

namespace rq {
namespace avx2 {

struct Simd {
    struct F { __m256 a, b; };
    struct I { __m256i a, b; };
    struct B { __m256i a, b; };
    struct Signed { __m256i a, b, size_a, size_b; };  // and magnitudes
    struct Pairs { __m256 even_a, odd_a, even_b, odd_b; };
    static constexpr int MOST_ROWS = 2;
    static constexpr int32_t SIGNED_EXCESS = 0;

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static I zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static __m256i at(const uint8_t *p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    }
    static B load(const uint8_t *p) { return {at(p), at(p + 32)}; }
    static Signed as_signed(B w) {
        return {w.a, w.b, _mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)};
    }
    static B low_nibbles(B w) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
    }
    static B high_nibbles(B w) {
        return low_nibbles({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)});
    }
    template <int N>
    static __m256i pair_of(__m256i high) {
        const __m256i mask = _mm256_set1_epi8(0x30);
        if (N < 2) return _mm256_and_si256(_mm256_slli_epi16(high, N == 0 ? 4 : 2), mask);
        return _mm256_and_si256(N == 2 ? high : _mm256_srli_epi16(high, 2), mask);
    }
    template <int N>
    static B six_bits(B low, B high) {
        return {_mm256_or_si256(low.a, pair_of<N>(high.a)),
                _mm256_or_si256(low.b, pair_of<N>(high.b))};
    }
    static __m256i four(const int8_t *x) {
        int32_t word;
        memcpy(&word, x, 4);
        return _mm256_set1_epi32(word);
    }
    // Codes of at most 127 times codes of at most 127, two at a time, fit 16 bits.
    static __m256i dot_half(__m256i sum, __m256i w, __m256i x) {
        const __m256i twos = _mm256_maddubs_epi16(w, x);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
    }
    static I dot(I sum, B w, const int8_t *x) {
        const __m256i v = four(x);
        return {dot_half(sum.a, w.a, v), dot_half(sum.b, w.b, v)};
    }
    static I dot_signed(I sum, const Signed &w, const int8_t *x) {
        const __m256i v = four(x);
        return {dot_half(sum.a, w.size_a, _mm256_sign_epi8(v, w.a)),
                dot_half(sum.b, w.size_b, _mm256_sign_epi8(v, w.b))};
    }
    static I add(I x, int32_t y) {
        const __m256i v = _mm256_set1_epi32(y);
        return {_mm256_add_epi32(x.a, v), _mm256_add_epi32(x.b, v)};
    }
    static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
    static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static F mul(F x, float y) { return mul(x, all(y)); }
    static F fma(F x, F y, F z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    static void store(float *p, F x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static __m128i eight(const uint8_t *p) {
        return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    }
    static F bytes(const uint8_t *p) {
        return to_float({_mm256_cvtepu8_epi32(eight(p)), _mm256_cvtepu8_epi32(eight(p + 8))});
    }
    static F signed_bytes(const uint8_t *p) {
        return to_float({_mm256_cvtepi8_epi32(eight(p)), _mm256_cvtepi8_epi32(eight(p + 8))});
    }
    static F halves(const uint8_t *p) {
        const __m128i *h = reinterpret_cast<const __m128i *>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
    }
    static __m256 evens(__m256i pairs) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    }
    static __m256 odds(__m256i pairs) {
        const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
        return _mm256_castsi256_ps(_mm256_and_si256(pairs, mask));
    }
    static Pairs load_pairs(const uint8_t *p) {
        const __m256i a = at(p), b = at(p + 32);
        return {evens(a), odds(a), evens(b), odds(b)};
    }
    static F dot_pairs(F sum, const Pairs &w, const uint16_t *x) {
        const __m256i pair = four(reinterpret_cast<const int8_t *>(x));
        const __m256 even = evens(pair), odd = odds(pair);
        sum = {_mm256_fmadd_ps(w.even_a, even, sum.a), _mm256_fmadd_ps(w.even_b, even, sum.b)};
        return {_mm256_fmadd_ps(w.odd_a, odd, sum.a), _mm256_fmadd_ps(w.odd_b, odd, sum.b)};
    }
};

#include "products.inl"

}  // namespace avx2

const Kernels avx2_kernels = {"avx2",
                              avx2::bf16_product,
                              avx2::q8_0_product,
                              avx2::q4_k_product,
                              avx2::q6_k_product,
                              avx2::quantise_row};

}  // namespace rq
#endif
