// LANES values at a time, with GCC's vector types. Included within a namespace of each instruction
// set.

#ifdef __GNUC__
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t M __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
static inline F all(float x) { return x - F{}; }
static inline float sum_of(F x) {
    float values[LANES], total = 0;
    memcpy(values, &x, sizeof x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) values[i] += values[i + half];
    total = values[0];
    return total;
}
static inline float most_of(F x) {
    float values[LANES];
    memcpy(values, &x, sizeof x);
    for (int i = 1; i < LANES; i++) values[0] = values[i] > values[0] ? values[i] : values[0];
    return values[0];
}
static inline F wide(H h) {
    const U u = __builtin_convertvector(h, U) << 16;
    F f;
    memcpy(&f, &u, sizeof f);
    return f;
}
// To the nearest, ties to even; no NaN becomes an infinity.
static inline H narrow(F f) {
    U u;
    memcpy(&u, &f, sizeof u);
    const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, kept = (u >> 16) | 64;
    const M is_nan = f != f;
    return __builtin_convertvector(is_nan ? kept : rounded, H);
}
#else
typedef float F;
typedef int32_t M;
typedef uint32_t U;
typedef uint16_t H;
static inline F all(float x) { return x; }
static inline float sum_of(F x) { return x; }
static inline float most_of(F x) { return x; }
static inline F wide(H h) { return from_bf16(h); }
static inline H narrow(F f) { return to_bf16(f); }
#endif

static inline F load(const float *p) {
    F f;
    memcpy(&f, p, sizeof f);
    return f;
}
static inline F load(const uint16_t *p) {
    H h;
    memcpy(&h, p, sizeof h);
    return wide(h);
}
static inline void store(float *p, F f) { memcpy(p, &f, sizeof f); }
static inline void store(uint16_t *p, F f) {
    const H h = narrow(f);
    memcpy(p, &h, sizeof h);
}
static inline int64_t lesser(int64_t x, int64_t y) { return y < x ? y : x; }
static inline F least(F x, F y) { return y < x ? y : x; }
static inline F most(F x, F y) { return x < y ? y : x; }

// 2^n e^r with |r| <= ln 2 / 2; within 2 units in the last place above e^-87, zero below, and no
// more than e^88. NaN stays.
static inline F exponential(F x) {
    const F y = most(least(x, all(88.0f)), all(-87.0f));
    const F shifted = y * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    F r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + (r + 1.0f);
    M bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000;
    F power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? all(0) : p * power;
}
static inline F sigmoid(F x) { return 1.0f / (1.0f + exponential(-x)); }

// A row of values: LANES of them at a place, or fewer, the others zero.
struct Line {
    char *p;
    bool is_half;

    Line(const Rows &rows, int64_t i)
        : p(rows.p ? static_cast<char *>(rows.p) + i * rows.stride * (rows.is_half ? 2 : 4) : nullptr),
          is_half(rows.is_half != 0) {}

    F at(int64_t i) const {
        return is_half ? load(reinterpret_cast<const uint16_t *>(p) + i)
                       : load(reinterpret_cast<const float *>(p) + i);
    }
    void put(int64_t i, F f) const {
        if (is_half)
            store(reinterpret_cast<uint16_t *>(p) + i, f);
        else
            store(reinterpret_cast<float *>(p) + i, f);
    }
    float one(int64_t i) const {
        return is_half ? from_bf16(reinterpret_cast<const uint16_t *>(p)[i])
                       : reinterpret_cast<const float *>(p)[i];
    }
    void put_one(int64_t i, float f) const {
        if (is_half)
            reinterpret_cast<uint16_t *>(p)[i] = to_bf16(f);
        else
            reinterpret_cast<float *>(p)[i] = f;
    }
    F at(int64_t i, int64_t num) const {
        if (num >= LANES) return at(i);
        float values[LANES] = {};
        for (int64_t j = 0; j < num; j++) values[j] = one(i + j);
        return load(values);
    }
    void put(int64_t i, F f, int64_t num) const {
        if (num >= LANES) return put(i, f);
        float values[LANES];
        store(values, f);
        for (int64_t j = 0; j < num; j++) put_one(i + j, values[j]);
    }
};

static inline F floats_at(const float *p, int64_t num) {
    return Line({const_cast<float *>(p), 0, 0}, 0).at(0, num);
}
