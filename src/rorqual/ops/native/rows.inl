// Work on rows, written once for all instruction sets. Included within a namespace of each, after
// its `Vec`, which holds 16 floats.

// Choice: sums run over 16 lanes, then over the lanes, whatever the instruction set has.
static void rms_norm(const float *x, const float *weight, float eps, int64_t n, float *y) {
    Vec squares = Vec::all(0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares = Vec::fma(Vec::load(x + i), Vec::load(x + i), squares);
    float sum = squares.sum();
    for (; i < n; i++) sum += x[i] * x[i];
    const float by = 1.0f / sqrtf(sum / static_cast<float>(n) + eps);
    const Vec all = Vec::all(by);
    for (i = 0; i + LANES <= n; i += LANES)
        Vec::mul(Vec::mul(Vec::load(x + i), all), Vec::load(weight + i)).store(y + i);
    for (; i < n; i++) y[i] = x[i] * by * weight[i];
}

static void swiglu(const float *gate, const float *up, float by, int64_t n, float *y) {
    int64_t i = 0;
    const Vec one = Vec::all(1), all = Vec::all(by);
    for (; i + LANES <= n; i += LANES) {
        const Vec g = Vec::load(gate + i);
        const Vec silu = Vec::div(g, Vec::add(one, Vec::exp(Vec::sub(Vec::all(0), g))));
        Vec::mul(Vec::mul(silu, Vec::load(up + i)), all).store(y + i);
    }
    for (; i < n; i++) y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i] * by;
}

static void narrow(const float *x, int64_t n, uint16_t *y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) Vec::load(x + i).store_bf16(y + i);
    for (; i < n; i++) y[i] = to_bf16(x[i]);
}

static void widen(const uint16_t *x, int64_t n, float *y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) Vec::load_bf16(x + i).store(y + i);
    for (; i < n; i++) y[i] = from_bf16(x[i]);
}

static void add(const float *x, float by, int64_t n, float *y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        Vec::fma(Vec::load(x + i), Vec::all(by), Vec::load(y + i)).store(y + i);
    for (; i < n; i++) y[i] += x[i] * by;
}

static void weigh(float *scores, int64_t stride, int64_t count, float *most, float *total,
                  float *change) {
    const Vec before = Vec::load(most);
    Vec m = before;
    for (int64_t s = 0; s < count; s++) m = Vec::max(m, Vec::load(scores + s * stride));
    // Before the first score `most` is -inf, and what was summed is multiplied by 0.
    const Vec by = Vec::exp(Vec::sub(before, m));
    Vec sum = Vec::mul(Vec::load(total), by);
    for (int64_t s = 0; s < count; s++) {
        const Vec weight = Vec::exp(Vec::sub(Vec::load(scores + s * stride), m));
        weight.store(scores + s * stride);
        sum = Vec::add(sum, weight);
    }
    m.store(most);
    by.store(change);
    sum.store(total);
}

static void pair(const float *x, int64_t stride, int64_t count, uint32_t *pairs) {
    for (int64_t s = 0; s < count; s += 2, pairs += LANES) {
        const Vec second = s + 1 < count ? Vec::load(x + (s + 1) * stride) : Vec::all(0);
        Vec::store_pairs(pairs, Vec::load(x + s * stride), second);
    }
}

static void scale(float *y, int64_t stride, int64_t rows, const float *by) {
    const Vec all = Vec::load(by);
    for (int64_t r = 0; r < rows; r++) Vec::mul(Vec::load(y + r * stride), all).store(y + r * stride);
}

template <int R>
static void sum_some(const float *weights, const float *values, int64_t stride, int64_t count,
                     int64_t width, float *out) {
    Vec acc[R];
    for (int r = 0; r < R; r++) acc[r] = Vec::load(out + r * width);
    for (int64_t s = 0; s < count; s++) {
        const Vec value = Vec::load(values + s * stride);
        for (int r = 0; r < R; r++) acc[r] = Vec::fma(Vec::all(weights[s * LANES + r]), value, acc[r]);
    }
    for (int r = 0; r < R; r++) acc[r].store(out + r * width);
}

static void sum_floats(const float *weights, const float *values, int64_t stride, int64_t count,
                       int64_t width, float *out) {
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES)
        for (int h = 0; h < LANES; h += Vec::HEADS)
            sum_some<Vec::HEADS>(weights + h, values + c, stride, count, width, out + h * width + c);
    for (; c < width; c++)
        for (int h = 0; h < LANES; h++)
            for (int64_t s = 0; s < count; s++)
                out[h * width + c] += weights[s * LANES + h] * values[s * stride + c];
}

static void sum_pairs(const uint32_t *weights, const uint16_t *values, int64_t stride, int64_t count,
                      int64_t width, float *out, const uint16_t *next) {
    int64_t c = 0;
    for (; c + Vec::PAIR_COLUMNS <= width; c += Vec::PAIR_COLUMNS)
        for (int h = 0; h < LANES; h += Vec::PAIR_HEADS) {
            Vec::sum_pairs(weights + h, values + c, stride, count, width, out + h * width + c, next);
            next += next ? count * LANES : 0;
        }
    for (; c < width; c++)
        for (int64_t s = 0; s < count; s++)
            for (int h = 0; h < LANES; h++) {
                const uint32_t both = weights[s / 2 * LANES + h];
                const uint16_t weight = static_cast<uint16_t>(s % 2 ? both >> 16 : both);
                out[h * width + c] += from_bf16(weight) * from_bf16(values[s * stride + c]);
            }
}

static void scale_codes(const int8_t *codes, float by, int64_t n, float *y) {
    for (int64_t i = 0; i < n; i++) y[i] = static_cast<float>(codes[i]) * by;
}

const RowKernels rows = {Vec::HAS_BF16, rms_norm, swiglu,     narrow,    widen,      add,
                         weigh,         pair,     scale,      sum_floats, sum_pairs, scale_codes};
