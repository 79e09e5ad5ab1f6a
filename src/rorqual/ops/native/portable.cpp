// Kernels in plain C++, for any processor.

#include <float.h>
#include <string.h>

#include <memory>

#include "formats.h"

namespace rq {
namespace portable {

constexpr const char *LEVEL = "portable";

struct Simd {
    struct F { float v[TILE]; };
    struct I { int32_t v[TILE]; };
    struct B { uint8_t v[64]; };
    struct Signed { int8_t v[64]; };
    struct Pairs { float even[TILE], odd[TILE]; };
    using Word = const void *;
    using Short = I;  // sums of codes of 4 bits
    static constexpr int FLOAT_ROWS = 2, CODE_ROWS = 2, NIBBLE_ROWS = 2, TILES = 1;
    static constexpr int32_t SIGNED_EXCESS = 0;

    static F zero() { return F{}; }
    static I ints(const void *p) {
        I x;
        for (int i = 0; i < TILE; i++) memcpy(x.v + i, p, 4);
        return x;
    }
    static F all_of(const void *p) {
        float f;
        memcpy(&f, p, 4);
        return all(f);
    }
    static F all(float a) {
        F f;
        for (int i = 0; i < TILE; i++) f.v[i] = a;
        return f;
    }
    static B load(const uint8_t *p) {
        B b;
        memcpy(b.v, p, 64);
        return b;
    }
    static Signed as_signed(B b) {
        Signed s;
        memcpy(s.v, b.v, 64);
        return s;
    }
    static B low_nibbles(B b) {
        for (int i = 0; i < 64; i++) b.v[i] &= 15;
        return b;
    }
    static B high_nibbles(B b) {
        for (int i = 0; i < 64; i++) b.v[i] >>= 4;
        return b;
    }
    static constexpr float HIGH = 1.0f;
    static B high_part(B b) { return high_nibbles(b); }
    static B low_six(B b) {
        for (int i = 0; i < 64; i++) b.v[i] &= 63;
        return b;
    }
    // Above 4 bits, the top two of another.
    static B top_two(B low, const B &top) {
        for (int i = 0; i < 64; i++) low.v[i] |= top.v[i] >> 6 << 4;
        return low;
    }
    template <int N>
    static B six_bits(B low, B high) {
        for (int i = 0; i < 64; i++) low.v[i] |= ((high.v[i] >> (2 * N)) & 3) << 4;
        return low;
    }
    static Word word(const void *p) { return p; }
    template <class Codes>
    static I dot_codes(I sum, const Codes &w, Word word) {
        int8_t x[STEP];
        memcpy(x, word, STEP);
        for (int i = 0; i < TILE; i++)
            for (int k = 0; k < STEP; k++) sum.v[i] += w.v[4 * i + k] * x[k];
        return sum;
    }
    static I dot_signed(I sum, Signed w, Word x) { return dot_codes(sum, w, x); }
    static I dot_two(I sum, B w0, B w1, Word x0, Word x1) {
        return dot_codes(dot_codes(sum, w0, x0), w1, x1);
    }
    static Short zero_short() { return Short{}; }
    static Short dot_short(Short sum, B w, Word x) { return dot_codes(sum, w, x); }
    static I widened(Short sum) { return sum; }
    static F to_float(I a) {
        F f;
        for (int i = 0; i < TILE; i++) f.v[i] = static_cast<float>(a.v[i]);
        return f;
    }
    static F mul(F a, F b) {
        for (int i = 0; i < TILE; i++) a.v[i] *= b.v[i];
        return a;
    }
    static F mul(F a, float b) { return mul(a, all(b)); }
    static F fma(F a, F b, F c) {
        for (int i = 0; i < TILE; i++) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    // The largest magnitude, NaN if there is one: their bits are in that order, as integers.
    static float most(F a, F b) {
        uint32_t size = 0;
        for (int i = 0; i < TILE; i++) {
            uint32_t x, y;
            memcpy(&x, a.v + i, 4);
            memcpy(&y, b.v + i, 4);
            x &= 0x7fffffff;
            y &= 0x7fffffff;
            size = x > size ? x : size;
            size = y > size ? y : size;
        }
        float most;
        memcpy(&most, &size, 4);
        return most;
    }
    // 16 codes, rounded; their sum.
    static int32_t store_codes(int8_t *p, F a) {
        constexpr float WHOLE = 12582912.0f;  // 1.5 * 2^23: what is added to it has no fraction
        int32_t sum = 0;
        for (int i = 0; i < TILE; i++) {
            const float whole = a.v[i] + WHOLE;
            p[i] = static_cast<int8_t>(whole - WHOLE);
            sum += p[i];
        }
        return sum;
    }
    static F add(F a, F b) {
        for (int i = 0; i < TILE; i++) a.v[i] += b.v[i];
        return a;
    }
    static void store_bytes(uint8_t *p, const B &b) { memcpy(p, b.v, 64); }
    static F load_floats(const float *p) { return load_part(p, TILE); }
    static F load_part(const float *p, int64_t num) {
        F f{};
        memcpy(f.v, p, num * sizeof(float));
        return f;
    }
    static void store_part(float *p, const F &a, int64_t num) { memcpy(p, a.v, num * sizeof(float)); }
    static void store(float *p, F a) { memcpy(p, a.v, sizeof a.v); }
    // Bytes 16 * N to 16 * N + 16.
    template <int N>
    static F bytes_of(const B &w) {
        F f;
        for (int i = 0; i < TILE; i++) f.v[i] = w.v[16 * N + i];
        return f;
    }
    static F signed_bytes(const uint8_t *p) {
        F f;
        for (int i = 0; i < TILE; i++) f.v[i] = static_cast<int8_t>(p[i]);
        return f;
    }
    static float half(uint16_t h) {
        const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
        const uint32_t exponent = (h >> 10) & 31, fraction = h & 1023;
        uint32_t bits = sign | ((exponent + 112) << 23) | (fraction << 13);
        if (exponent == 31) bits = sign | 0x7f800000 | (fraction << 13);
        float f;
        memcpy(&f, &bits, 4);
        if (exponent == 0) {  // subnormal: fraction * 2^-24
            f = static_cast<float>(fraction) * 5.9604644775390625e-8f;
            f = sign ? -f : f;
        }
        return f;
    }
    static F halves(const uint8_t *p) {
        F f;
        for (int i = 0; i < TILE; i++) {
            uint16_t h;
            memcpy(&h, p + 2 * i, 2);
            f.v[i] = half(h);
        }
        return f;
    }
    static F floats(const uint8_t *p) {
        F f;
        memcpy(f.v, p, sizeof f.v);
        return f;
    }
    template <int N>
    static F byte_of(const B &w) {
        F f;
        for (int i = 0; i < TILE; i++) f.v[i] = w.v[4 * i + N];
        return f;
    }
    static B excess_128(B w) {
        for (int i = 0; i < 64; i++) w.v[i] ^= 128;
        return w;
    }
    static void widen_pairs(const uint8_t *p, F &even, F &odd) {
        const Pairs w = load_pairs(p);
        memcpy(even.v, w.even, sizeof even.v);
        memcpy(odd.v, w.odd, sizeof odd.v);
    }
    // Lane i of v[k] to rows[i * stride + k], k below num.
    static void store_transposed(const F *v, float *rows, int64_t stride, int64_t num) {
        for (int i = 0; i < TILE; i++)
            for (int64_t k = 0; k < num; k++) rows[i * stride + k] = v[k].v[i];
    }
    static float wide(uint16_t b) {
        const uint32_t bits = static_cast<uint32_t>(b) << 16;
        float f;
        memcpy(&f, &bits, 4);
        return f;
    }
    static Pairs load_pairs(const uint8_t *p) {
        Pairs w;
        for (int i = 0; i < TILE; i++) {
            uint16_t pair[2];
            memcpy(pair, p + 4 * i, 4);
            w.even[i] = wide(pair[0]);
            w.odd[i] = wide(pair[1]);
        }
        return w;
    }
    static F dot_pairs(F sum, const Pairs &w, Word word) {
        uint16_t x[2];
        memcpy(x, word, 4);
        const float a = wide(x[0]), b = wide(x[1]);
        for (int i = 0; i < TILE; i++) sum.v[i] += w.even[i] * a + w.odd[i] * b;
        return sum;
    }
};

// Loops over lanes are loops of their own here: unrolling those around them only costs the compiler.
#define RQ_UNROLL(num)
#include "products.inl"
#include "decode.inl"
#include "table.inl"

}  // namespace portable
}  // namespace rq
