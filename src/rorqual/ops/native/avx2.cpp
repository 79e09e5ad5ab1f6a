// Kernels for processors with AVX2, FMA and F16C.

#include "formats.h"

#ifdef RQ_X86
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#include <float.h>
#include <string.h>

#include <memory>

namespace rq {
namespace avx2 {

constexpr const char *LEVEL = "avx2";

struct Simd {
    struct F { __m256 a, b; };
    struct I { __m256i a, b; };
    struct B { __m256i a, b; };
    struct Signed { __m256i a, b, size_a, size_b; };  // and magnitudes
    struct Pairs { __m256 even_a, odd_a, even_b, odd_b; };
    using Word = __m256i;
    using Short = B;  // sums of codes of 4 bits: 16 bits hold 8 steps
    static constexpr int FLOAT_ROWS = 4, CODE_ROWS = 4, NIBBLE_ROWS = 2, TILES = 1;
    static constexpr int32_t SIGNED_EXCESS = 0;

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static I ints(const void *p) { return {word(p), word(p)}; }
    static F all_of(const void *p) {
        float f;
        memcpy(&f, p, 4);
        return all(f);
    }
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
    static constexpr float HIGH = 1.0f;  // sums of 16 bits have no room for more
    static B high_part(B w) { return high_nibbles(w); }
    static B low_six(B w) {
        const __m256i mask = _mm256_set1_epi8(63);
        return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
    }
    // Above 4 bits, the top two of another.
    static B top_two(B low, B top) {
        return {_mm256_or_si256(low.a, pair_of<3>(top.a)), _mm256_or_si256(low.b, pair_of<3>(top.b))};
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
    static Word word(const void *p) {
        int32_t x;
        memcpy(&x, p, 4);
        return _mm256_set1_epi32(x);
    }
    static __m256i pairs_sum(__m256i x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
    // Codes of at most 128 times codes of at most 127, two at a time, fit 16 bits.
    static I dot_signed(I sum, const Signed &w, Word v) {
        const __m256i a = _mm256_maddubs_epi16(w.size_a, _mm256_sign_epi8(v, w.a));
        const __m256i b = _mm256_maddubs_epi16(w.size_b, _mm256_sign_epi8(v, w.b));
        return {_mm256_add_epi32(sum.a, pairs_sum(a)), _mm256_add_epi32(sum.b, pairs_sum(b))};
    }
    // Codes of at most 63: two steps fit 16 bits.
    static I dot_two(I sum, B w0, B w1, Word x0, Word x1) {
        const Short two = dot_short(dot_short(zero_short(), w0, x0), w1, x1);
        return {_mm256_add_epi32(sum.a, pairs_sum(two.a)), _mm256_add_epi32(sum.b, pairs_sum(two.b))};
    }
    static Short zero_short() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Short dot_short(Short sum, B w, Word v) {
        return {_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(w.a, v)),
                _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(w.b, v))};
    }
    static I widened(Short sum) { return {pairs_sum(sum.a), pairs_sum(sum.b)}; }
    static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
    static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static F mul(F x, float y) { return mul(x, all(y)); }
    static F fma(F x, F y, F z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    static __m256i size(__m256 x) {
        return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    }
    // The largest magnitude, NaN if there is one: their bits are in that order, as integers.
    static float most(F x, F y) {
        const __m256i eight = _mm256_max_epi32(_mm256_max_epi32(size(x.a), size(x.b)),
                                               _mm256_max_epi32(size(y.a), size(y.b)));
        __m128i four =
            _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
        return _mm_cvtss_f32(_mm_castsi128_ps(four));
    }
    // 16 codes, rounded; their sum.
    static int32_t store_codes(int8_t *p, F x) {
        const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
        const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        const __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(low, high));
        __m128i sum = _mm_madd_epi16(_mm_add_epi16(low, high), _mm_set1_epi16(1));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
    }
    static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static void store_bytes(uint8_t *p, B x) {
        __m256i *to = reinterpret_cast<__m256i *>(p);
        _mm256_storeu_si256(to, x.a);
        _mm256_storeu_si256(to + 1, x.b);
    }
    static F load_floats(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static F load_part(const float *p, int64_t num) {
        if (num == TILE) return load_floats(p);
        float all[TILE] = {};
        memcpy(all, p, num * sizeof(float));
        return load_floats(all);
    }
    static void store_part(float *p, F x, int64_t num) {
        if (num == TILE) return store(p, x);
        float all[TILE];
        store(all, x);
        memcpy(p, all, num * sizeof(float));
    }
    static void store(float *p, F x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static __m128i eight(const uint8_t *p) {
        return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    }
    static __m128i sixteen(const uint8_t *p) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    }
    // Bytes 16 * N to 16 * N + 16.
    template <int N>
    static F bytes_of(B w) {
        const __m128i x = _mm256_extracti128_si256(N < 2 ? w.a : w.b, N % 2);
        return to_float({_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))});
    }
    static F signed_bytes(const uint8_t *p) {
        return to_float({_mm256_cvtepi8_epi32(eight(p)), _mm256_cvtepi8_epi32(eight(p + 8))});
    }
    static F halves(const uint8_t *p) {
        const __m128i *h = reinterpret_cast<const __m128i *>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
    }
    static F floats(const uint8_t *p) {
        const float *f = reinterpret_cast<const float *>(p);
        return {_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)};
    }
    template <int N>
    static F byte_of(B w) {
        const __m256i mask = _mm256_set1_epi32(255);
        return to_float({_mm256_and_si256(_mm256_srli_epi32(w.a, 8 * N), mask),
                         _mm256_and_si256(_mm256_srli_epi32(w.b, 8 * N), mask)});
    }
    static B excess_128(B w) {
        const __m256i top = _mm256_set1_epi8(-128);
        return {_mm256_xor_si256(w.a, top), _mm256_xor_si256(w.b, top)};
    }
    static void widen_pairs(const uint8_t *p, F &even, F &odd) {
        const Pairs w = load_pairs(p);
        even = {w.even_a, w.even_b};
        odd = {w.odd_a, w.odd_b};
    }
    // Lanes i of eight vectors to rows[i * stride ...].
    static void store_eight(const __m256 *v, float *rows, int64_t stride) {
        __m256 a[8], b[8];
        for (int i = 0; i < 8; i += 2) {
            a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
            a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
        }
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 2; j++) {
                b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
                b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
            }
        for (int j = 0; j < 4; j++) {
            _mm256_storeu_ps(rows + j * stride, _mm256_permute2f128_ps(b[j], b[j + 4], 0x20));
            _mm256_storeu_ps(rows + (j + 4) * stride, _mm256_permute2f128_ps(b[j], b[j + 4], 0x31));
        }
    }
    // Lane i of v[k] to rows[i * stride + k], k below num.
    static void store_transposed(const F *v, float *rows, int64_t stride, int64_t num) {
        if (num < 16) {
            for (int64_t k = 0; k < num; k++) {
                float lanes[TILE];
                store(lanes, v[k]);
                for (int i = 0; i < TILE; i++) rows[i * stride + k] = lanes[i];
            }
            return;
        }
        for (int half = 0; half < 16; half += 8) {
            __m256 a[8], b[8];
            for (int k = 0; k < 8; k++) {
                a[k] = v[half + k].a;
                b[k] = v[half + k].b;
            }
            store_eight(a, rows + half, stride);
            store_eight(b, rows + half + 8 * stride, stride);
        }
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
    static F dot_pairs(F sum, const Pairs &w, Word pair) {
        const __m256 even = evens(pair), odd = odds(pair);
        sum = {_mm256_fmadd_ps(w.even_a, even, sum.a), _mm256_fmadd_ps(w.even_b, even, sum.b)};
        return {_mm256_fmadd_ps(w.odd_a, odd, sum.a), _mm256_fmadd_ps(w.odd_b, odd, sum.b)};
    }
};

#include "products.inl"
#include "decode.inl"
#include "table.inl"

}  // namespace avx2
}  // namespace rq
#endif
