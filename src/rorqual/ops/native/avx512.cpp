// Kernels for processors with AVX-512, its byte products (VNNI) and bfloat16 products.

#include "formats.h"

#ifdef RQ_X86
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // both within the compiler's headers
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#include <float.h>
#include <string.h>

#include <memory>

namespace rq {
namespace avx512 {

constexpr const char *LEVEL = "avx512";

struct Simd {
    using F = __m512;
    using I = __m512i;
    using B = __m512i;
    using Signed = __m512i;
    using Pairs = __m512i;
    using Short = __m512i;  // sums of codes of 4 bits
    using Word = __m512i;
    static constexpr int FLOAT_ROWS = 8, CODE_ROWS = 8, NIBBLE_ROWS = 8, TILES = 2;
    // The instruction takes unsigned weights: 128 is added to signed ones, and what that adds to
    // the sum is taken off again.
    static constexpr int32_t SIGNED_EXCESS = -128;

    static F zero() { return _mm512_setzero_ps(); }
    static B load(const uint8_t *p) { return _mm512_loadu_si512(p); }
    static Signed as_signed(B w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
    static B low_nibbles(B w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
    static B high_nibbles(B w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }
    // High nibbles where they stand: HIGH of them.
    static constexpr float HIGH = 1.0f / 16;
    static B high_part(B w) { return _mm512_and_si512(w, _mm512_set1_epi8(-16)); }
    static B low_six(B w) { return _mm512_and_si512(w, _mm512_set1_epi8(63)); }
    // Above 4 bits, the top two of another.
    static B top_two(B low, B top) {
        const B two = _mm512_and_si512(_mm512_srli_epi16(top, 2), _mm512_set1_epi8(0x30));
        return _mm512_or_si512(low, two);
    }
    template <int N>
    static B six_bits(B low, B high) {
        const B mask = _mm512_set1_epi8(0x30);
        B pair = high;
        if (N < 2) pair = _mm512_slli_epi16(high, N == 0 ? 4 : 2);
        if (N == 3) pair = _mm512_srli_epi16(high, 2);
        return _mm512_or_si512(low, _mm512_and_si512(pair, mask));
    }
    static I ints(const void *p) {
        int32_t x;
        memcpy(&x, p, 4);
        return _mm512_set1_epi32(x);
    }
    static F all_of(const void *p) {
        float f;
        memcpy(&f, p, 4);
        return _mm512_set1_ps(f);
    }
    static Word word(const void *p) { return ints(p); }
    static I dot_signed(I sum, Signed w, Word x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static I dot_two(I sum, B w0, B w1, Word x0, Word x1) {
        return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, w0, x0), w1, x1);
    }
    static Short zero_short() { return _mm512_setzero_si512(); }
    static Short dot_short(Short sum, B w, Word x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static I widened(Short sum) { return sum; }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static F mul(F x, F y) { return _mm512_mul_ps(x, y); }
    static F mul(F x, float y) { return _mm512_mul_ps(x, _mm512_set1_ps(y)); }
    static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
    // The largest magnitude, NaN if there is one: their bits are in that order, as integers.
    static float most(F x, F y) {
        const I sizes = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(x)),
                                         _mm512_castps_si512(_mm512_abs_ps(y)));
        const int32_t bits = _mm512_reduce_max_epi32(sizes);
        float most;
        memcpy(&most, &bits, 4);
        return most;
    }
    // 16 codes, rounded; their sum.
    static int32_t store_codes(int8_t *p, F x) {
        const I codes = _mm512_cvtps_epi32(x);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(codes));
        return _mm512_reduce_add_epi32(codes);
    }
    static F add(F x, F y) { return _mm512_add_ps(x, y); }
    static void store(float *p, F x) { _mm512_storeu_ps(p, x); }
    static void store_bytes(uint8_t *p, B x) { _mm512_storeu_si512(p, x); }
    static F load_floats(const float *p) { return _mm512_loadu_ps(p); }
    static F load_part(const float *p, int64_t num) { return _mm512_maskz_loadu_ps(below(num), p); }
    static void store_part(float *p, F x, int64_t num) {
        _mm512_mask_storeu_ps(p, below(num), x);
    }
    static __mmask16 below(int64_t num) {
        return num >= 16 ? 0xffff : static_cast<__mmask16>((1u << num) - 1);
    }
    static __m128i sixteen(const uint8_t *p) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    }
    // Bytes 16 * N to 16 * N + 16.
    template <int N>
    static F bytes_of(B w) {
        return to_float(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(w, N)));
    }
    static F signed_bytes(const uint8_t *p) { return to_float(_mm512_cvtepi8_epi32(sixteen(p))); }
    static F halves(const uint8_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static F floats(const uint8_t *p) { return _mm512_loadu_ps(p); }
    template <int N>
    static F byte_of(B w) {
        if (N == 3) return to_float(_mm512_srli_epi32(w, 24));
        return to_float(_mm512_and_si512(_mm512_srli_epi32(w, 8 * N), _mm512_set1_epi32(255)));
    }
    static B excess_128(B w) { return as_signed(w); }
    static void widen_pairs(const uint8_t *p, F &even, F &odd) {
        const I w = load(p);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(~0xffff)));
    }
    // Lane i of v[k] to rows[i * stride + k], k below num.
    static void store_transposed(const F *v, float *rows, int64_t stride, int64_t num) {
        F a[16], b[16];
        for (int i = 0; i < 16; i += 2) {
            a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
            a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; j++) {
                const __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + j + 2]);
                b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
                b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
            }
        const __mmask16 mask = below(num);
        for (int j = 0; j < 4; j++) {  // rows j, j + 4, j + 8, j + 12
            const F low = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x44);
            const F high = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xee);
            const F low2 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x44);
            const F high2 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xee);
            float *to = rows + j * stride;
            _mm512_mask_storeu_ps(to, mask, _mm512_shuffle_f32x4(low, low2, 0x88));
            _mm512_mask_storeu_ps(to + 4 * stride, mask, _mm512_shuffle_f32x4(low, low2, 0xdd));
            _mm512_mask_storeu_ps(to + 8 * stride, mask, _mm512_shuffle_f32x4(high, high2, 0x88));
            _mm512_mask_storeu_ps(to + 12 * stride, mask, _mm512_shuffle_f32x4(high, high2, 0xdd));
        }
    }
    static Pairs load_pairs(const uint8_t *p) { return load(p); }
    static F dot_pairs(F sum, Pairs w, Word x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
    }
};

#include "products.inl"
#include "decode.inl"
#include "table.inl"

}  // namespace avx512
}  // namespace rq
#endif
