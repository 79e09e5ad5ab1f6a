// Encoders of the blocks of 32 values (`ops/quant_blocks.py` has their layouts). Included after
// `encode_search.inl`. -0 is taken for 0. A value that is not finite makes a scale that is not.

constexpr int SMALL = 32;

static inline uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Of the size alone, in whose order they are: minimums of integers are vectorised.
static inline int32_t size_bits(float f) { return static_cast<int32_t>(bits_of(f) & 0x7fffffff); }

// Finite, and of a size that some scale may reach: what is not may look like a value that an
// importance has given up.
static inline bool are_possible(const float *x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t size = size_bits(x[i]);
        most = size > most ? size : most;
    }
    return most <= size_bits(LARGEST);
}

static inline float inverse_of(float scale) {
    return fabsf(scale) < SMALLEST ? 0.0f : 1.0f / scale;
}

// x within [low, high], and low for what is not a number.
static inline float within(float x, float low, float high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

// The nearest whole number, ties to even, as an integer.
static inline int32_t whole(float x) {
    return static_cast<int32_t>(bits_of(x + ROUNDER) - bits_of(ROUNDER));
}

static inline bool put_half(uint8_t *at, float value) {
    const uint16_t half = half_bits(value);
    at[0] = half & 255;
    at[1] = half >> 8;
    return is_finite_half(half);
}

static inline int32_t greatest_size(const float *x) {
    int32_t most = 0;
    for (int i = 0; i < SMALL; i++) {
        const int32_t size = size_bits(x[i]);
        most = size > most ? size : most;
    }
    return most;
}

static bool q8_0_block(const float *x, uint8_t *block) {
    const float scale = float_of(static_cast<uint32_t>(greatest_size(x))) / 127;
    const float inverse = inverse_of(scale);
    for (int i = 0; i < SMALL; i++) {
        // C's roundf: halves go away from zero.
        const float scaled = x[i] * inverse;
        const int32_t size = static_cast<int32_t>(within(fabsf(scaled) + 0.5f, 0, 128));
        block[2 + i] = static_cast<uint8_t>(scaled < 0 ? -size : size);
    }
    return put_half(block, scale);
}

// The first of the values farthest from zero.
static inline float extreme_of(const float *x) {
    const int32_t most = greatest_size(x);
    int first = SMALL;
    for (int i = 0; i < SMALL; i++) {
        const int here = size_bits(x[i]) == most ? i : SMALL;
        first = here < first ? here : first;
    }
    return x[first] + 0.0f;
}

// Of eight codes at once: the factor moves bit 4 of byte k to bit 56 + k.
static inline void fifth_bits(const uint8_t *codes, uint8_t *out) {
    for (int k = 0; k < SMALL / 8; k++) {
        uint64_t eight;
        memcpy(&eight, codes + 8 * k, 8);
        out[k] = static_cast<uint8_t>(
            ((eight >> 4) & 0x0101010101010101ull) * 0x0102040810204080ull >> 56);
    }
}

// Fifth bits, where there are some, and nibbles; `code` gives the code of value i.
template <typename Code>
static inline void put_codes(bool has_five_bits, uint8_t *out, Code code) {
    uint8_t codes[SMALL];
    for (int i = 0; i < SMALL; i++) codes[i] = static_cast<uint8_t>(code(i));
    if (has_five_bits) {
        fifth_bits(codes, out);
        out += 4;
    }
    for (int i = 0; i < SMALL / 2; i++)
        out[i] = static_cast<uint8_t>((codes[i] & 15) | (codes[SMALL / 2 + i] << 4));
}

static bool signed_block(const float *x, int half, uint8_t *block) {
    const float scale = extreme_of(x) / static_cast<float>(-half);
    const float inverse = inverse_of(scale), middle = static_cast<float>(half) + 0.5f;
    const float highest = static_cast<float>(2 * half - 1);
    put_codes(half > 8, block + 2, [=](int i) {
        return static_cast<int32_t>(within(x[i] * inverse + middle, 0, highest));
    });
    return put_half(block, scale);
}

// Bits of floats as integers in the same order, and back.
static inline int32_t in_order(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

static bool above_min_block(const float *x, int top, uint8_t *block) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int i = 0; i < SMALL; i++) {
        const int32_t place = in_order(static_cast<int32_t>(bits_of(x[i])));
        least = place < least ? place : least;
        most = place > most ? place : most;
    }
    const float low = float_of(static_cast<uint32_t>(in_order(least))) + 0.0f;
    const float high = float_of(static_cast<uint32_t>(in_order(most))) + 0.0f;
    const float scale = (high - low) / static_cast<float>(top), inverse = inverse_of(scale);
    put_codes(top > 15, block + 4, [=](int i) {
        const float code = (x[i] - low) * inverse + 0.5f;
        return static_cast<int32_t>(within(code, 0, static_cast<float>(top)));
    });
    const bool is_low = put_half(block + 2, low);
    return put_half(block, scale) & is_low;
}

// Puts groups of n values side by side, -0 as 0; what lacks of SIDE groups is zeros.
static void side_by_side(const float *x, int num_groups, int n, float *rows) {
    if (num_groups < SIDE) memset(rows, 0, sizeof(float) * SIDE * n);
    for (int g = 0; g < num_groups; g++)
        for (int i = 0; i < n; i++) rows[i * SIDE + g] = x[g * n + i] + 0.0f;
}

// The mean square, added up as `quant_bits.mean_square` does: columns of sixteen.
static float mean_square(const float *x, int64_t n) {
    float total[SIDE] = {};
    for (int64_t start = 0; start < n; start += SIDE * SIDE) {
        const int64_t end = start + SIDE * SIDE < n ? start + SIDE * SIDE : n;
        float sum[SIDE] = {};
        for (int64_t i = start; i < end; i += SIDE)
            for (int k = 0; k < SIDE; k++) sum[k] = sum[k] + x[i + k] * x[i + k];
        for (int k = 0; k < SIDE; k++) total[k] = total[k] + sum[k];
    }
    float sum = 0;
    for (int k = 0; k < SIDE; k++) sum = sum + total[k];
    return sum / static_cast<float>(n);
}

// Importance times sqrt(mean + x^2): a large value's error counts for more.
static inline void weigh(const float *x, const float *importance, float mean, int n,
                         float *weight) {
    for (int i = 0; i < n; i++) weight[i] = importance[i] * sqrtf(mean + x[i] * x[i]);
}

// With an importance, at most SIDE blocks of one row; `mean`: the row's mean square.
static bool searched_blocks(const Encoding &e, const float *x, const float *importance,
                            int num_blocks, float mean, uint8_t *blocks, size_t size) {
    alignas(64) float weight[SIDE * SMALL], rows[SIDE * SMALL], weights[SIDE * SMALL];
    alignas(64) float scale[SIDE], depth[SIDE] = {};
    weigh(x, importance, mean, num_blocks * SMALL, weight);
    side_by_side(x, num_blocks, SMALL, rows);
    side_by_side(weight, num_blocks, SMALL, weights);
    const bool is_signed = e.type == Q4_0 || e.type == Q5_0;
    const bool has_five_bits = e.type == Q5_0 || e.type == Q5_1;
    const int half = has_five_bits ? 16 : 8, top = 2 * half - 1;
    if (is_signed)
        fit_scale(rows, weights, SMALL, half, scale);
    else
        fit_scale_and_min(rows, weights, SMALL, top, FINE_GRID, false, scale, depth);
    bool is_held = true;
    for (int b = 0; b < num_blocks; b++, x += SMALL, blocks += size) {
        const float inverse = inverse_of(scale[b]), low = is_signed ? 0.0f : -depth[b];
        const int first = is_signed ? -half : 0;
        is_held &= put_half(blocks, scale[b]);
        if (!is_signed) is_held &= put_half(blocks + 2, low);
        put_codes(has_five_bits, blocks + (is_signed ? 2 : 4), [=](int i) {
            const float held = within((x[i] - low) * inverse, static_cast<float>(first),
                                      static_cast<float>(first + top));
            return whole(held) - first;
        });
    }
    return is_held;
}

static bool small_row(const Encoding &e, const float *x, uint8_t *blocks, size_t size) {
    const int64_t num_blocks = e.num_columns / SMALL;
    bool is_held = true;
    if (e.importance != nullptr && e.type != Q8_0) {
        if (!are_possible(x, e.num_columns)) return false;
        const float mean = mean_square(x, e.num_columns);
        for (int64_t b = 0; b < num_blocks; b += SIDE) {
            const int count = static_cast<int>(num_blocks - b < SIDE ? num_blocks - b : SIDE);
            is_held &= searched_blocks(e, x + b * SMALL, e.importance + b * SMALL, count, mean,
                                       blocks + b * size, size);
        }
        return is_held;
    }
    for (int64_t b = 0; b < num_blocks; b++, x += SMALL, blocks += size) {
        switch (e.type) {
        case Q8_0: is_held &= q8_0_block(x, blocks); break;
        case Q4_0: is_held &= signed_block(x, 8, blocks); break;
        case Q5_0: is_held &= signed_block(x, 16, blocks); break;
        case Q4_1: is_held &= above_min_block(x, 15, blocks); break;
        default: is_held &= above_min_block(x, 31, blocks); break;
        }
    }
    return is_held;
}
