// Kernels for processors with AVX-512, its byte products (VNNI) and bfloat16 products.

#include "formats.h"

#ifdef RQ_X86
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#include <immintrin.h>
#include <string.h>

namespace rq {
namespace avx512 {

struct Simd {
    using F = __m512;
    using I = __m512i;
    using B = __m512i;
    using Signed = __m512i;
    using Pairs = __m512i;
    static constexpr int MOST_ROWS = 8;
    // The instruction takes unsigned weights: 128 is added to signed ones, and what that adds to
    // the sum is taken off again.
    static constexpr int32_t SIGNED_EXCESS = -128;

    static F zero() { return _mm512_setzero_ps(); }
    static I zero_int() { return _mm512_setzero_si512(); }
    static F all(float x) { return _mm512_set1_ps(x); }
    static B load(const uint8_t *p) { return _mm512_loadu_si512(p); }
    static Signed as_signed(B w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
    static B low_nibbles(B w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
    static B high_nibbles(B w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }
    template <int N>
    static B six_bits(B low, B high) {
        const B mask = _mm512_set1_epi8(0x30);
        B pair = high;
        if (N < 2) pair = _mm512_slli_epi16(high, N == 0 ? 4 : 2);
        if (N == 3) pair = _mm512_srli_epi16(high, 2);
        return _mm512_or_si512(low, _mm512_and_si512(pair, mask));
    }
    static I four(const int8_t *x) {
        int32_t word;
        memcpy(&word, x, 4);
        return _mm512_set1_epi32(word);
    }
    static I dot(I sum, B w, const int8_t *x) { return _mm512_dpbusd_epi32(sum, w, four(x)); }
    static I dot_signed(I sum, Signed w, const int8_t *x) { return dot(sum, w, x); }
    static I add(I x, int32_t y) { return _mm512_add_epi32(x, _mm512_set1_epi32(y)); }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static F mul(F x, F y) { return _mm512_mul_ps(x, y); }
    static F mul(F x, float y) { return _mm512_mul_ps(x, _mm512_set1_ps(y)); }
    static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
    static void store(float *p, F x) { _mm512_storeu_ps(p, x); }
    static __m128i sixteen(const uint8_t *p) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    }
    static F bytes(const uint8_t *p) { return to_float(_mm512_cvtepu8_epi32(sixteen(p))); }
    static F signed_bytes(const uint8_t *p) { return to_float(_mm512_cvtepi8_epi32(sixteen(p))); }
    static F halves(const uint8_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static Pairs load_pairs(const uint8_t *p) { return load(p); }
    static F dot_pairs(F sum, Pairs w, const uint16_t *x) {
        const I pair = four(reinterpret_cast<const int8_t *>(x));
        return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)pair);
    }
};

#include "products.inl"

}  // namespace avx512

const Kernels avx512_kernels = {"avx512",
                                avx512::bf16_product,
                                avx512::q8_0_product,
                                avx512::q4_k_product,
                                avx512::q6_k_product,
                                avx512::quantise_row};

}  // namespace rq
#endif
