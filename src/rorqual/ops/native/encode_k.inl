// Encoders of the K-quants (`ops/k_quants_encode.py`; `ops/k_quants.py` has their layouts).
// Included after `encode_small.inl`.

constexpr int SUPER = 256;
constexpr int BATCH = SIDE;  // super-blocks whose scales are searched for together

// A super-block taken apart. Scales of Q3_K and Q6_K are signed.
struct Parts {
    uint8_t codes[SUPER];
    int8_t scale[16];
    uint8_t low[16];
    uint8_t d[2], dmin[2];
};

struct KType {
    int group, top, scale_top;  // Q3_K and Q6_K: half of the codes, half of the scales' codes
    bool is_signed;
    Grid grid;
    float sigma;  // times the mean square, in a weight with an importance
};

static KType k_type(int type) {
    switch (type) {
    case Q2_K: return {16, 3, 15, false, GRID_2_BITS, 1};
    case Q3_K: return {16, 4, 32, true, SIGNED_GRID, 2};
    case Q4_K: return {32, 15, 63, false, GRID_4_BITS, 2};
    case Q5_K: return {32, 31, 63, false, GRID_5_BITS, 2};
    default: return {16, 32, 128, true, SIGNED_GRID, 0};
    }
}

// The lowest bits of numbers, from each byte's lowest on: byte k has numbers k, stride + k and so on.
static inline void pack_bits(const uint8_t *numbers, int bits, int num_bytes, int stride,
                             uint8_t *out) {
    const int mask = (1 << bits) - 1;
    for (int k = 0; k < num_bytes; k++) {
        int packed = 0;
        for (int j = 0; j < 8 / bits; j++) packed |= (numbers[j * stride + k] & mask) << (j * bits);
        out[k] = static_cast<uint8_t>(packed);
    }
}

static void pack_q2_k(const Parts &p, uint8_t *out) {
    for (int g = 0; g < 16; g++) out[g] = static_cast<uint8_t>(p.scale[g] | (p.low[g] << 4));
    for (int half = 0; half < 2; half++)
        pack_bits(p.codes + half * 128, 2, 32, 32, out + 16 + half * 32);
    memcpy(out + 80, p.d, 2);
    memcpy(out + 82, p.dmin, 2);
}

static void pack_q3_k(const Parts &p, uint8_t *out) {
    uint8_t high[SUPER], six_bits[16], high_scale[16];
    for (int i = 0; i < SUPER; i++) high[i] = p.codes[i] >> 2;
    for (int g = 0; g < 16; g++) {
        six_bits[g] = static_cast<uint8_t>(p.scale[g] + 32);
        high_scale[g] = six_bits[g] >> 4;
    }
    pack_bits(high, 1, 32, 32, out);
    for (int half = 0; half < 2; half++)
        pack_bits(p.codes + half * 128, 2, 32, 32, out + 32 + half * 32);
    pack_bits(six_bits, 4, 8, 8, out + 96);
    pack_bits(high_scale, 2, 4, 4, out + 104);
    memcpy(out + 108, p.d, 2);
}

static void pack_head_with_mins(const Parts &p, uint8_t *out) {
    memcpy(out, p.d, 2);
    memcpy(out + 2, p.dmin, 2);
    for (int g = 0; g < 4; g++) {
        const int scale = p.scale[g + 4], low = p.low[g + 4];
        out[4 + g] = static_cast<uint8_t>(p.scale[g] | (scale >> 4 << 6));
        out[8 + g] = static_cast<uint8_t>(p.low[g] | (low >> 4 << 6));
        out[12 + g] = static_cast<uint8_t>((scale & 15) | ((low & 15) << 4));
    }
}

static void pack_q4_k(const Parts &p, uint8_t *out) {
    pack_head_with_mins(p, out);
    for (int part = 0; part < 4; part++)
        pack_bits(p.codes + part * 64, 4, 32, 32, out + 16 + part * 32);
}

static void pack_q5_k(const Parts &p, uint8_t *out) {
    uint8_t high[SUPER];
    for (int i = 0; i < SUPER; i++) high[i] = p.codes[i] >> 4;
    pack_head_with_mins(p, out);
    pack_bits(high, 1, 32, 32, out + 16);
    for (int part = 0; part < 4; part++)
        pack_bits(p.codes + part * 64, 4, 32, 32, out + 48 + part * 32);
}

static void pack_q6_k(const Parts &p, uint8_t *out) {
    uint8_t high[SUPER];
    for (int i = 0; i < SUPER; i++) high[i] = p.codes[i] >> 4;
    for (int half = 0; half < 2; half++) {
        pack_bits(p.codes + half * 128, 4, 64, 64, out + half * 64);
        pack_bits(high + half * 128, 2, 32, 32, out + 128 + half * 32);
    }
    memcpy(out + 192, p.scale, 16);
    memcpy(out + 208, p.d, 2);
}

// What is found for the groups of a batch, in their order.
struct Fits {
    alignas(64) float scale[SUPER], depth[SUPER], sum_w[SUPER];
};

// Weights of SIDE groups without an importance, side by side as the values are.
static void own_weights(int type, const float *rows, int n, float *weights) {
    for (int g = 0; g < SIDE; g += LANES) {
        const auto value = [&](int i) { return load(rows + i * SIDE + g); };
        const F squares = sum_rows(n, [&](int i) { return value(i) * value(i); });
        const F mean = squares / static_cast<float>(n);
        float roots[LANES];
        store(roots, mean);
        for (int k = 0; k < LANES; k++) roots[k] = sqrtf(roots[k]);
        const F root = load(roots);
        for (int i = 0; i < n; i++) {
            F weight = value(i) * value(i);
            if (type == Q2_K) weight = absolute(value(i));
            if (type == Q3_K) weight = weight + mean;
            if (type == Q4_K || type == Q5_K) weight = absolute(value(i)) + root;
            store(weights + i * SIDE + g, weight);
        }
    }
}

// Of the groups of `num_supers` super-blocks at x.
static void weights_of(const Encoding &e, const KType &t, const float *x, int num_supers,
                       const float *rows, float *weights) {
    const int n = t.group, num_groups = num_supers * SUPER / n;
    if (e.importance == nullptr) {
        own_weights(e.type, rows, n, weights);
        return;
    }
    alignas(64) float weight[SIDE * MOST];
    for (int s = 0; s < num_supers; s++) {
        const float *own = e.importance + (x - e.x + s * SUPER) % e.num_columns;
        const float *values = x + s * SUPER;
        if (e.type == Q6_K)
            memcpy(weight + s * SUPER, own, sizeof(float) * SUPER);
        else
            weigh(values, own, t.sigma * mean_square(values, SUPER), SUPER, weight + s * SUPER);
    }
    side_by_side(weight, num_groups, n, weights);
}

// The scales (and depths) of a batch's groups.
static void fit_batch(const Encoding &e, const KType &t, const float *x, int num_supers,
                      Fits &fits) {
    alignas(64) float rows[SIDE * MOST], weights[SIDE * MOST];
    const int per_side = SIDE * t.group / SUPER, num_groups = SUPER / t.group;
    const bool has_importance = e.importance != nullptr;
    for (int s = 0; s < num_supers; s += per_side, x += per_side * SUPER) {
        const int count = num_supers - s < per_side ? num_supers - s : per_side;
        const int at = s * num_groups;
        side_by_side(x, count * num_groups, t.group, rows);
        weights_of(e, t, x, count, rows, weights);
        if (t.is_signed) {
            fit_scale(rows, weights, t.group, t.top, fits.scale + at);
        } else {
            const bool is_absolute = e.type == Q2_K && !has_importance;
            fit_scale_and_min(rows, weights, t.group, t.top, has_importance ? FINE_GRID : t.grid,
                              is_absolute, fits.scale + at, fits.depth + at);
        }
        for (int g = 0; has_importance && g < SIDE; g += LANES)
            store(fits.sum_w + at + g, sum_rows(t.group, [&](int i) {
                      return load(weights + i * SIDE + g);
                  }));
    }
}

// Scales or depths of the super-blocks of a batch as codes, and what they are multiplied with.
struct Scales {
    float codes[SUPER];
    float d[BATCH];
};

// By the greatest, which gets the last code.
static void scales_from_zero(const float *values, int n, int top, float *codes, float *d) {
    float high = values[0];
    for (int g = 1; g < n; g++) high = !(values[g] <= high) && high == high ? values[g] : high;
    const float last = static_cast<float>(top), factor = last * inverse_of(high);
    for (int g = 0; g < n; g++)
        codes[g] = static_cast<float>(whole(within(values[g] * factor, 0, last)));
    *d = high / last;
}

// By the one farthest from zero, the first of them, which gets the code -half.
static void scales_around_zero(const float *values, int n, int half, float *codes, float *d) {
    float extreme = values[0];
    for (int g = 1; g < n; g++) extreme = fabsf(values[g]) > fabsf(extreme) ? values[g] : extreme;
    const bool is_zero = fabsf(extreme) < TINY;
    const float lowest = static_cast<float>(-half), factor = is_zero ? 0.0f : lowest / extreme;
    for (int g = 0; g < n; g++)
        codes[g] = static_cast<float>(whole(within(values[g] * factor, lowest, -lowest - 1)));
    *d = is_zero ? 0.0f : 1 / factor;
}

// By a search, in which a group counts as much as its weights.
static void scales_searched(const KType &t, const float *values, const float *sum_w,
                            int num_supers, Scales &out) {
    alignas(64) float rows[SUPER], weights[SUPER], codes[SUPER] = {};
    const int n = SUPER / t.group;
    side_by_side(values, num_supers, n, rows);
    side_by_side(sum_w, num_supers, n, weights);
    if (t.is_signed)
        fit_scale(rows, weights, n, t.scale_top, out.d);
    else
        fit_scales(rows, weights, n, t.scale_top, out.d, codes);
    const float half = static_cast<float>(t.scale_top);
    for (int s = 0; s < num_supers; s++) {
        const float inverse = inverse_of(out.d[s]);
        for (int g = 0; g < n; g++) {
            const float held = within(values[s * n + g] * inverse, -half, half - 1);
            out.codes[s * n + g] =
                t.is_signed ? static_cast<float>(whole(held)) : codes[g * SIDE + s];
        }
    }
}

static void quantise_scales(const Encoding &e, const KType &t, const float *values,
                            const Fits &fits, int num_supers, Scales &out) {
    if (e.importance != nullptr && e.type != Q6_K) {
        scales_searched(t, values, fits.sum_w, num_supers, out);
        return;
    }
    const int n = SUPER / t.group;
    for (int s = 0; s < num_supers; s++) {
        const auto by = t.is_signed ? scales_around_zero : scales_from_zero;
        by(values + s * n, n, t.scale_top, out.codes + s * n, out.d + s);
    }
}

// Every value rounded with what a decoder will see. False if float16 does not hold a scale.
static bool take_apart(const KType &t, const float *x, const float *scale, float d,
                       const float *low, float dmin, Parts &p) {
    const int n = t.group;
    const bool is_held = put_half(p.d, d) & put_half(p.dmin, dmin);
    const float seen = wide_half(half_bits(d)), seen_min = wide_half(half_bits(dmin));
    const int first = t.is_signed ? -t.top : 0;
    const float lowest = static_cast<float>(first);
    const float highest = static_cast<float>(t.is_signed ? t.top - 1 : t.top);
    for (int g = 0; g < SUPER / n; g++) {
        p.scale[g] = static_cast<int8_t>(scale[g]);
        p.low[g] = static_cast<uint8_t>(low[g]);
        const float inverse = inverse_of(seen * scale[g]), depth = seen_min * low[g];
        for (int i = 0; i < n; i++) {
            const float scaled = (x[g * n + i] + depth) * inverse;
            p.codes[g * n + i] =
                static_cast<uint8_t>(whole(within(scaled, lowest, highest)) - first);
        }
    }
    return is_held;
}

static bool k_batch(const Encoding &e, const KType &t, const float *x, int num_supers,
                    uint8_t *blocks, size_t size) {
    if (!are_possible(x, num_supers * SUPER)) return false;
    Fits fits;
    Scales scales, depths{};
    fit_batch(e, t, x, num_supers, fits);
    quantise_scales(e, t, fits.scale, fits, num_supers, scales);
    if (!t.is_signed) quantise_scales(e, t, fits.depth, fits, num_supers, depths);
    bool is_held = true;
    for (int s = 0; s < num_supers; s++) {
        const int at = s * SUPER / t.group;
        Parts parts;
        is_held &= take_apart(t, x + s * SUPER, scales.codes + at, scales.d[s], depths.codes + at,
                              depths.d[s], parts);
        uint8_t *out = blocks + s * size;
        switch (e.type) {
        case Q2_K: pack_q2_k(parts, out); break;
        case Q3_K: pack_q3_k(parts, out); break;
        case Q4_K: pack_q4_k(parts, out); break;
        case Q5_K: pack_q5_k(parts, out); break;
        default: pack_q6_k(parts, out); break;
        }
    }
    return is_held;
}

static size_t block_bytes(int type) {
    switch (type) {
    case Q4_0: return 18;
    case Q4_1: return 20;
    case Q5_0: return 22;
    case Q5_1: return 24;
    case Q8_0: return 34;
    case Q2_K: return 84;
    case Q3_K: return 110;
    case Q4_K: return 144;
    case Q5_K: return 176;
    default: return 210;
    }
}

bool encode(const Encoding &e) {
    const size_t size = block_bytes(e.type);
    bool is_held = true;
    if (e.type < Q2_K) {
        const int64_t row_bytes = e.num_columns / SMALL * size;
        for (int64_t r = 0; is_held && r < e.num_rows; r++)
            is_held = small_row(e, e.x + r * e.num_columns, e.blocks + r * row_bytes, size);
        return is_held;
    }
    const KType type = k_type(e.type);
    const int64_t num_supers = e.num_rows * e.num_columns / SUPER;
    for (int64_t s = 0; is_held && s < num_supers; s += BATCH) {
        const int count = static_cast<int>(num_supers - s < BATCH ? num_supers - s : BATCH);
        is_held = k_batch(e, type, e.x + s * SUPER, count, e.blocks + s * size, size);
    }
    return is_held;
}
