// Work on rows in plain C++, for any processor.

#include <math.h>
#include <string.h>

#include "bf16.h"
#include "formats.h"
#include "vector.h"

namespace rq {
namespace portable {

struct Vec {
    float v[LANES];
    static constexpr bool HAS_BF16 = false;
    static constexpr int HEADS = 4;
    static constexpr int PAIR_HEADS = HEADS, PAIR_COLUMNS = LANES;

    template <class F>
    static Vec each(F f) {
        Vec out;
        for (int i = 0; i < LANES; i++) out.v[i] = f(i);
        return out;
    }
    static Vec all(float x) {
        return each([=](int) { return x; });
    }
    static Vec load(const float *p) {
        return each([=](int i) { return p[i]; });
    }
    void store(float *p) const { memcpy(p, v, sizeof v); }
    static Vec add(const Vec &x, const Vec &y) {
        return each([&](int i) { return x.v[i] + y.v[i]; });
    }
    static Vec sub(const Vec &x, const Vec &y) {
        return each([&](int i) { return x.v[i] - y.v[i]; });
    }
    static Vec mul(const Vec &x, const Vec &y) {
        return each([&](int i) { return x.v[i] * y.v[i]; });
    }
    static Vec div(const Vec &x, const Vec &y) {
        return each([&](int i) { return x.v[i] / y.v[i]; });
    }
    static Vec max(const Vec &x, const Vec &y) {
        return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
    }
    static Vec fma(const Vec &x, const Vec &y, const Vec &z) {
        return each([&](int i) { return x.v[i] * y.v[i] + z.v[i]; });
    }
    float sum() const {
        float total = 0;
        for (int i = 0; i < LANES; i++) total += v[i];
        return total;
    }
    static Vec exp(const Vec &x) {
        return each([&](int i) { return expf(x.v[i]); });
    }
    static Vec load_bf16(const uint16_t *p) {
        return each([=](int i) { return from_bf16(p[i]); });
    }
    void store_bf16(uint16_t *p) const {
        for (int i = 0; i < LANES; i++) p[i] = to_bf16(v[i]);
    }
    static void store_pairs(uint32_t *p, const Vec &first, const Vec &second) {
        for (int i = 0; i < LANES; i++)
            p[i] = to_bf16(first.v[i]) | static_cast<uint32_t>(to_bf16(second.v[i])) << 16;
    }
    static void sum_pairs(const uint32_t *weights, const uint16_t *values, int64_t stride,
                          int64_t count, int64_t width, float *out, const uint16_t *) {
        for (int64_t s = 0; s < count; s++)
            for (int r = 0; r < HEADS; r++) {
                const uint32_t both = weights[s / 2 * LANES + r];
                const float w = from_bf16(static_cast<uint16_t>(s % 2 ? both >> 16 : both));
                for (int c = 0; c < LANES; c++)
                    out[r * width + c] += w * from_bf16(values[s * stride + c]);
            }
    }
};

#include "rows.inl"

}  // namespace portable

}  // namespace rq
