// The search for the scale of a group (`ops/quant_search.py`, which has the same roundings in the
// same order), for LANES groups at a time. Included within a namespace of each instruction set.
//
// Groups lie side by side, sixteen of them: value i of group g is x[i * SIDE + g].

constexpr int SIDE = 16;
constexpr int MOST = 32;  // values of a group
constexpr float TINY = 1e-15f;
constexpr float SMALLEST = 0x1p-126f;  // has an inverse
constexpr float LARGEST = 0x1p28f;     // beyond what any block's float16 scale reaches

#ifdef __GNUC__
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t M __attribute__((vector_size(4 * LANES)));  // a mask: all bits of a lane, or none
static inline F all(float x) { return x - F{}; }
static inline F absolute(F x) { return reinterpret_cast<F>(reinterpret_cast<M>(x) & 0x7fffffff); }
#else
typedef float F;
typedef bool M;
static inline F all(float x) { return x; }
static inline F absolute(F x) { return fabsf(x); }
#endif

static inline F load(const float *p) {
    F f;
    memcpy(&f, p, sizeof f);
    return f;
}
static inline void store(float *p, F f) { memcpy(p, &f, sizeof f); }
static inline F least(F x, F y) { return y < x ? y : x; }
static inline F most(F x, F y) { return x < y ? y : x; }
static inline F most_or_nan(F x, F y) { return (x < y) | (y != y) ? y : x; }

// To the nearest, ties to even, of at most 2^22: above it floats of this size have no fractions.
constexpr float ROUNDER = 12582912.0f;
static inline F rounded(F x) { return (x + ROUNDER) - ROUNDER; }
static inline F code_of(F x, F low, F high) { return rounded(least(most(x, low), high)); }

// What is added to the number of levels: first .. last times the size.
struct Grid {
    int first, last;
    double size;
};
constexpr Grid GRID_2_BITS = {-3, 7, 0.15}, GRID_4_BITS = {-5, 5, 0.2}, GRID_5_BITS = {-3, 7, 0.15};
constexpr Grid FINE_GRID = {-9, 9, 0.1}, SIGNED_GRID = {-6, 6, 0.15};
constexpr int SCALES_STEPS = 4;
constexpr double SCALES_SIZE = 0.1;
constexpr int MOST_ROUNDS = 5;

// Sums are of sixteen rows, one after the other, and then of those sums.
template <typename Term>
static inline F sum_rows(int n, Term term) {
    F total = all(0);
    for (int half = 0; half < n; half += SIDE) {
        const int end = half + SIDE < n ? half + SIDE : n;
        F sum = term(half);
        for (int i = half + 1; i < end; i++) sum = sum + term(i);
        total = half == 0 ? sum : total + sum;
    }
    return total;
}

// Groups of n values with codes 0 .. top above a minimum.
struct AboveMin {
    const float *x, *weight;
    int n;
    bool is_absolute;  // chooses by the weighted absolute error
    F middle, rest;    // codes are counted from the middle: -middle .. rest
    F mean, sum_w, high;
    F best, scale, low;

    struct Sums {
        F l, ll, xl;
    };

    // Codes for so many levels from the minimum so far, and sums of weights times code, its square,
    // and it times the value's distance from the mean.
    Sums sums_of(F levels, F *codes) const {
        const F width = high - low, none = all(0);
        const M is_wide = width > none;
        const F factor = is_wide ? levels / (is_wide ? width : all(1)) : none;
        const F start = low * factor + middle, lowest = -middle;
        Sums sums{none, none, none};
        for (int half = 0; half < n; half += SIDE) {
            F l = none, ll = none, xl = none;
            for (int i = half; i < half + SIDE; i++) {
                const F value = load(x + i * SIDE);
                const F code = code_of(value * factor - start, lowest, rest);
                const F product = load(weight + i * SIDE) * code;
                l = l + product;
                ll = ll + product * code;
                xl = xl + product * (value - mean);
                if (is_absolute) codes[i] = code;
            }
            sums = {sums.l + l, sums.ll + ll, sums.xl + xl};
        }
        return sums;
    }

    F absolute_error(const F *codes, F step, F at_middle) const {
        return sum_rows(n, [&](int i) {
            const F error = absolute(codes[i] * step + at_middle - load(x + i * SIDE));
            return error * load(weight + i * SIDE);
        });
    }

    // The first candidate reaches both extremes and is not fitted.
    void begin(float top) {
        middle = all(static_cast<float>((static_cast<int>(top) + 1) / 2));
        rest = top - middle;
        low = high = load(x);
        for (int i = 1; i < n; i++) {
            low = least(low, load(x + i * SIDE));
            high = most(high, load(x + i * SIDE));
        }
        low = least(low, all(0));
        sum_w = sum_rows(n, [&](int i) { return load(weight + i * SIDE); });
        const F sum_x = sum_rows(n, [&](int i) {
            const int at = i * SIDE;
            return load(weight + at) * load(x + at);
        });
        mean = sum_x / (sum_w > all(0) ? sum_w : all(1));
        F codes[MOST];
        const Sums s = sums_of(all(top), codes);
        scale = (high - low) / top;
        const F at_middle = low + scale * middle;
        if (is_absolute) {
            best = -absolute_error(codes, scale, at_middle);
            return;
        }
        const F shift = at_middle - mean;
        best = scale * (2.0f * (s.xl - shift * s.l) - scale * s.ll);
        best = best - shift * shift * sum_w;
    }

    void improve(float levels) {
        F codes[MOST];
        const F none = all(0);
        const Sums s = sums_of(all(levels), codes);
        const F safe_w = sum_w > none ? sum_w : all(1);
        const F variance = s.ll - s.l * s.l / safe_w;
        const M is_usable = variance > none;
        F step = s.xl / (is_usable ? variance : all(1));
        F at_middle = mean - step * s.l / safe_w;
        F quality = step * s.xl;
        // A minimum above zero cannot be stored: the line goes through zero then.
        const M is_above = at_middle > step * middle;
        const F whole_ll = s.ll + middle * (2.0f * s.l + middle * sum_w);
        const F whole_xl = s.xl + mean * (s.l + middle * sum_w);
        const F through_zero = whole_xl / (whole_ll > none ? whole_ll : all(1));
        quality = is_above ? through_zero * whole_xl - mean * mean * sum_w : quality;
        step = is_above ? through_zero : step;
        at_middle = is_above ? step * middle : at_middle;
        if (is_absolute) quality = -absolute_error(codes, step, at_middle);
        const M is_better = is_usable & (step > none) & (quality > best);
        best = is_better ? quality : best;
        scale = is_better ? step : scale;
        low = is_better ? at_middle - step * middle : low;
    }
};

// scale[g], depth[g] of SIDE groups for x ~ scale * code - depth with codes 0 .. top.
static void fit_scale_and_min(const float *x, const float *weight, int n, int top, Grid grid,
                              bool is_absolute, float *scale, float *depth) {
    for (int g = 0; g < SIDE; g += LANES) {
        AboveMin search;
        search.x = x + g;
        search.weight = weight + g;
        search.n = n;
        search.is_absolute = is_absolute;
        search.begin(static_cast<float>(top));
        for (int step = grid.first; step <= grid.last; step++)
            search.improve(static_cast<float>(top + step * grid.size));
        store(scale + g, search.scale);
        store(depth + g, -least(search.low, all(0)));
    }
}

// scale[g], of either sign, of SIDE groups for x ~ scale * code with codes -half .. half - 1.
static void fit_scale(const float *x, const float *weight, int n, int half, float *scale) {
    const F none = all(0), lowest = all(static_cast<float>(-half));
    const F highest = all(static_cast<float>(half - 1));
    for (int g = 0; g < SIDE; g += LANES) {
        F low = load(x + g), high = low;
        for (int i = 1; i < n; i++) {
            low = least(low, load(x + i * SIDE + g));
            high = most(high, load(x + i * SIDE + g));
        }
        const F extreme = high >= -low ? high : low;
        const M is_zero = absolute(extreme) < all(TINY);
        const F inverse = is_zero ? none : -1.0f / (is_zero ? all(1) : extreme);
        F best = none, found = none;
        for (int step = SIGNED_GRID.first; step <= SIGNED_GRID.last; step++) {
            const F factor = static_cast<float>(half + step * SIGNED_GRID.size) * inverse;
            F sum_xl = none, sum_ll = none;
            for (int part = 0; part < n; part += SIDE) {
                F xl = none, ll = none;
                for (int i = part; i < part + SIDE; i++) {
                    const F value = load(x + i * SIDE + g);
                    const F code = code_of(value * factor, lowest, highest);
                    const F product = load(weight + i * SIDE + g) * code;
                    xl = xl + product * value;
                    ll = ll + product * code;
                }
                sum_xl = sum_xl + xl;
                sum_ll = sum_ll + ll;
            }
            const M is_usable = sum_ll > none;
            const F fitted = is_usable ? sum_xl / (is_usable ? sum_ll : all(1)) : none;
            const F quality = fitted * sum_xl;
            const M is_better = quality > best;
            best = is_better ? quality : best;
            found = is_better ? fitted : found;
        }
        store(scale + g, found);
    }
}

// The scale and codes[i * SIDE + g] of x >= 0 with codes 0 .. top: scales or minimums of SIDE
// super-blocks. The best of nine scales, then each code is moved alone while that lowers the error.
static void fit_scales(const float *x, const float *weight, int n, int top, float *scale,
                       float *codes) {
    const F none = all(0), highest = all(static_cast<float>(top));
    for (int g = 0; g < SIDE; g += LANES) {
        F high = load(x + g);
        for (int i = 1; i < n; i++) high = most_or_nan(high, load(x + i * SIDE + g));
        const F inverse = high < all(TINY) ? none : 1.0f / high;
        F best = all(INFINITY);
        for (int i = 0; i < n; i++) store(codes + i * SIDE + g, none);
        for (int step = 0; step <= 2 * SCALES_STEPS; step++) {
            // 0, -1, 1, -2, 2 and so on: the first that is best stays.
            const int away = step % 2 ? -(step + 1) / 2 : step / 2;
            const F factor = static_cast<float>(top + away * SCALES_SIZE) * inverse;
            const F back = factor > none ? 1.0f / factor : none;
            F candidate[SIDE];
            for (int i = 0; i < n; i++)
                candidate[i] = rounded(least(load(x + i * SIDE + g) * factor, highest));
            const F error = sum_rows(n, [&](int i) {
                const F distance = load(x + i * SIDE + g) - back * candidate[i];
                return load(weight + i * SIDE + g) * (distance * distance);
            });
            const M is_better = error < best;
            best = is_better ? error : best;
            for (int i = 0; i < n; i++) {
                float *code = codes + i * SIDE + g;
                store(code, is_better ? candidate[i] : load(code));
            }
        }
        F sum_xl = sum_rows(n, [&](int i) {
            const int at = i * SIDE + g;
            return load(weight + at) * load(x + at) * load(codes + at);
        });
        F sum_ll = sum_rows(n, [&](int i) {
            const int at = i * SIDE + g;
            return load(weight + at) * load(codes + at) * load(codes + at);
        });
        for (int round = 0; round < MOST_ROUNDS; round++) {
            for (int i = 0; i < n; i++) {
                const F value = load(x + i * SIDE + g), by = load(weight + i * SIDE + g);
                const F code = load(codes + i * SIDE + g);
                const F rest_xl = sum_xl - by * value * code, rest_ll = sum_ll - by * code * code;
                const M is_usable = (rest_xl > none) & (rest_ll > none);
                const F fitted = value * rest_ll / (is_usable ? rest_xl : all(1));
                const F moved = code_of(fitted, none, highest);
                const F new_xl = rest_xl + by * value * moved;
                const F new_ll = rest_ll + by * moved * moved;
                const M is_better = is_usable & (moved != code) &
                                    (new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll);
                sum_xl = is_better ? new_xl : sum_xl;
                sum_ll = is_better ? new_ll : sum_ll;
                store(codes + i * SIDE + g, is_better ? moved : code);
            }
        }
        store(scale + g, sum_ll > none ? sum_xl / sum_ll : none);
    }
}
