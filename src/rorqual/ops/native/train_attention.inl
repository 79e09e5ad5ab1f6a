// Causal attention of one head of a sequence, and its gradients: scores of a block of queries at a
// time. Rotary pairs stay neighbours. Included within a namespace of each instruction set.

constexpr int64_t BLOCK = 64;  // Choice: queries of a block

// c (R, V vectors) = a b, or += : a's value (i, k) is a[i * row + k * column].
template <int R, int V>
static inline void tile(int64_t depth, const float *a, int64_t row, int64_t column, const float *b,
                        int64_t stride_b, float *c, int64_t stride_c, bool adds) {
    F sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sums[r][v] = adds ? load(c + r * stride_c + v * LANES) : all(0);
    for (int64_t k = 0; k < depth; k++) {
        F values[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) values[v] = load(b + k * stride_b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const F x = all(a[r * row + k * column]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sums[r][v] += x * values[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(c + r * stride_c + v * LANES, sums[r][v]);
}

template <int V>
static void strip(int64_t rows, int64_t depth, const float *a, int64_t row, int64_t column,
                  const float *b, int64_t stride_b, float *c, int64_t stride_c, bool adds) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
        tile<TILE_ROWS, V>(depth, a + i * row, row, column, b, stride_b, c + i * stride_c, stride_c,
                           adds);
    for (; i < rows; i++)
        tile<1, V>(depth, a + i * row, row, column, b, stride_b, c + i * stride_c, stride_c, adds);
}

// c (rows, columns) = a (rows, depth) times b (depth, columns), or +=; columns are whole vectors.
static void product(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t row,
                    int64_t column, const float *b, int64_t stride_b, float *c, int64_t stride_c,
                    bool adds = false) {
    int64_t j = 0, left = columns / LANES;
    for (; left >= TILE_VECTORS && left != 4; left -= TILE_VECTORS, j += TILE_VECTORS * LANES)
        strip<TILE_VECTORS>(rows, depth, a, row, column, b + j, stride_b, c + j, stride_c, adds);
    for (; left >= 2; left -= 2, j += 2 * LANES)
        strip<2>(rows, depth, a, row, column, b + j, stride_b, c + j, stride_c, adds);
    for (; left > 0; left--, j += LANES)
        strip<1>(rows, depth, a, row, column, b + j, stride_b, c + j, stride_c, adds);
}

static int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// y (columns, stride) = the transpose of x (rows, width); what is beyond the rows is zero.
static void transpose(const float *x, int64_t rows, int64_t width, int64_t columns, float *y,
                      int64_t stride) {
    constexpr int64_t SIDE = 16;
    for (int64_t t = 0; t < stride; t += SIDE)
        for (int64_t c = 0; c < columns; c++)
            for (int64_t j = t; j < lesser(t + SIDE, stride); j++)
                y[c * stride + j] = j < rows ? x[j * width + c] : 0.0f;
}

// One head of a sequence: its rows as floats, widths rounded up to whole vectors.
class Head {
  public:
    Head(const Attend &a, int64_t item)
        : a_(a), n_(a.num_tokens), b_(item / a.num_heads), h_(item % a.num_heads),
          key_(whole(a.nope + a.turned)), value_(whole(a.value)), seen_(whole(n_)) {}

    static std::unique_ptr<float[]> floats(int64_t n) {
        return std::unique_ptr<float[]>(new float[n]());
    }

    // Queries, times the scale, and keys are rotated.
    void read() {
        q_ = floats(n_ * key_);
        k_ = floats(n_ * key_);
        v_ = floats(n_ * value_);
        keys_ = floats(key_ * seen_);
        scores_ = floats(BLOCK * seen_);
        for (int64_t t = 0; t < n_; t++) {
            float *q = q_.get() + t * key_, *k = k_.get() + t * key_;
            copy(a_.q, t, h_ * width(), width(), q, static_cast<float>(a_.scale));
            copy(a_.kv, t, h_ * both(), a_.nope, k, 1.0f);
            copy(a_.rope, t, 0, a_.turned, k + a_.nope, 1.0f);
            copy(a_.kv, t, h_ * both() + a_.nope, a_.value, v_.get() + t * value_, 1.0f);
            turn(q + a_.nope, t, 1.0f);
            turn(k + a_.nope, t, 1.0f);
        }
        transpose(k_.get(), n_, key_, width(), keys_.get(), seen_);
    }

    void forward() {
        read();
        const std::unique_ptr<float[]> out = floats(BLOCK * value_);
        for (int64_t first = 0; first < n_; first += BLOCK) {
            const int64_t rows = lesser(BLOCK, n_ - first), last = first + rows;
            const int64_t from = first_seen(first, last);
            score(first, rows, from);
            for (int64_t r = 0; r < rows; r++) lse()[first + r] = softmax(first + r, row(r), from, last);
            product(rows, value_, last - from, row(0) + from, seen_, 1, v_.get() + from * value_,
                    value_, out.get(), value_);
            for (int64_t r = 0; r < rows; r++)
                put(a_.out, first + r, h_ * a_.value, a_.value, out.get() + r * value_);
        }
    }

    void backward() {
        read();
        const std::unique_ptr<float[]> dout = floats(n_ * value_), values = floats(value_ * seen_),
                                       dscores = floats(BLOCK * seen_), dq = floats(BLOCK * key_),
                                       dk = floats(n_ * key_), dv = floats(n_ * value_);
        for (int64_t t = 0; t < n_; t++)
            copy(a_.dout, t, h_ * a_.value, a_.value, dout.get() + t * value_, 1.0f);
        transpose(v_.get(), n_, value_, a_.value, values.get(), seen_);
        for (int64_t first = 0; first < n_; first += BLOCK) {
            const int64_t rows = lesser(BLOCK, n_ - first), last = first + rows;
            const int64_t from = first_seen(first, last), num = last - from, end = whole(last);
            const float *d = dout.get() + first * value_;
            score(first, rows, from);
            product(rows, end - from, a_.value, d, value_, 1, values.get() + from, seen_,
                    dscores.get() + from, seen_);
            for (int64_t r = 0; r < rows; r++)
                score_grad(first + r, d + r * value_, row(r), dscores.get() + r * seen_, from, last);
            product(num, value_, rows, row(0) + from, 1, seen_, d, value_, dv.get() + from * value_,
                    value_, true);
            product(num, key_, rows, dscores.get() + from, 1, seen_, q_.get() + first * key_, key_,
                    dk.get() + from * key_, key_, true);
            product(rows, key_, num, dscores.get() + from, seen_, 1, k_.get() + from * key_, key_,
                    dq.get(), key_);
            for (int64_t r = 0; r < rows; r++) put_query(first + r, dq.get() + r * key_);
        }
        for (int64_t t = 0; t < n_; t++) {
            const float *k = dk.get() + t * key_;
            put(a_.dkv, t, h_ * both(), a_.nope, k);
            put(a_.dkv, t, h_ * both() + a_.nope, a_.value, dv.get() + t * value_);
            memcpy(a_.drope + ((b_ * a_.num_heads + h_) * n_ + t) * a_.turned, k + a_.nope,
                   a_.turned * sizeof(float));
        }
    }

  private:
    int64_t width() const { return a_.nope + a_.turned; }
    int64_t both() const { return a_.nope + a_.value; }
    float *row(int64_t r) { return scores_.get() + r * seen_; }
    float *lse() const { return a_.lse + (b_ * a_.num_heads + h_) * n_; }

    void copy(const Rows &rows, int64_t t, int64_t place, int64_t num, float *y, float by) const {
        const Line x(rows, b_ * n_ + t);
        const Line to({y, 0, 0}, 0);
        for (int64_t i = 0; i < num; i += LANES)
            to.put(i, x.at(place + i, num - i) * by, num - i);
    }

    void put(const Rows &rows, int64_t t, int64_t place, int64_t num, const float *x) const {
        const Line y(rows, b_ * n_ + t);
        for (int64_t i = 0; i < num; i += LANES)
            y.put(place + i, floats_at(x + i, num - i), num - i);
    }

    // Pairs of neighbours by the token's angles; sign -1: back.
    void turn(float *x, int64_t t, float sign) const {
        const int64_t half = a_.turned / 2;
        const float *cos = a_.cos + b_ * a_.angles + t * half, *sin = a_.sin + b_ * a_.angles + t * half;
        for (int64_t i = 0; i < half; i++) {
            const float x0 = x[2 * i], x1 = x[2 * i + 1], s = sin[i] * sign;
            x[2 * i] = x0 * cos[i] - x1 * s;
            x[2 * i + 1] = x1 * cos[i] + x0 * s;
        }
    }

    void put_query(int64_t t, float *dq) const {
        for (int64_t i = 0; i < width(); i++) dq[i] *= static_cast<float>(a_.scale);
        turn(dq + a_.nope, t, -1.0f);
        put(a_.dq, t, h_ * width(), width(), dq);
    }

    // The first key, of a whole vector, that one of these queries may see.
    int64_t first_seen(int64_t first, int64_t last) const {
        if (!a_.documents) return 0;
        const int64_t *of = a_.documents + b_ * n_;
        int64_t low = of[first], high = of[first];
        for (int64_t t = first + 1; t < last; t++) {
            low = of[t] < low ? of[t] : low;
            high = of[t] > high ? of[t] : high;
        }
        int64_t s = 0;
        while (of[s] < low || of[s] > high) s++;
        return s / LANES * LANES;
    }

    void score(int64_t first, int64_t rows, int64_t from) {
        product(rows, whole(first + rows) - from, width(), q_.get() + first * key_, key_, 1,
                keys_.get() + from, seen_, row(0) + from, seen_);
    }

    // What query t may not see becomes `hidden`.
    void hide(int64_t t, float *row, int64_t from, int64_t last, float hidden) const {
        if (a_.documents) {
            const int64_t *of = a_.documents + b_ * n_;
            for (int64_t s = from; s < t; s++)
                if (of[s] != of[t]) row[s] = hidden;
        }
        for (int64_t s = t + 1; s < whole(last); s++) row[s] = hidden;
    }

    // The row becomes its softmax; returns the logarithm of its sum.
    float softmax(int64_t t, float *row, int64_t from, int64_t last) const {
        hide(t, row, from, last, -INFINITY);
        F highest = all(-INFINITY), sums = all(0);
        for (int64_t s = from; s < whole(last); s += LANES) highest = most(highest, load(row + s));
        const float top = most_of(highest);
        for (int64_t s = from; s < whole(last); s += LANES) {
            const F e = exponential(load(row + s) - top);
            sums = sums + e;
            store(row + s, e);
        }
        const float total = sum_of(sums), by = 1.0f / total;
        for (int64_t s = from; s < whole(last); s += LANES) store(row + s, load(row + s) * by);
        return top + logf(total);
    }

    // `scores` become probabilities, and `dscores`, the gradient of these, that of the scores.
    void score_grad(int64_t t, const float *dout, float *scores, float *dscores, int64_t from,
                    int64_t last) const {
        const Line out(a_.out, b_ * n_ + t);
        F dot = all(0);
        for (int64_t i = 0; i < a_.value; i += LANES)
            dot = dot + out.at(h_ * a_.value + i, a_.value - i) * floats_at(dout + i, a_.value - i);
        const float mean = sum_of(dot), shift = lse()[t];
        hide(t, scores, from, last, -INFINITY);
        for (int64_t s = from; s < whole(last); s += LANES) {
            const F p = exponential(load(scores + s) - shift);
            store(scores + s, p);
            store(dscores + s, p * (load(dscores + s) - mean));
        }
    }

    const Attend &a_;
    const int64_t n_, b_, h_, key_, value_, seen_;
    std::unique_ptr<float[]> q_, k_, v_, keys_, scores_;
};

static void attend(const void *arguments, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) Head(*static_cast<const Attend *>(arguments), i).forward();
}

static void attend_grad(const void *arguments, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) Head(*static_cast<const Attend *>(arguments), i).backward();
}

static void rope_grad(const void *arguments, int64_t first, int64_t last) {
    const Attend &a = *static_cast<const Attend *>(arguments);
    const int64_t n = a.num_tokens, half = a.turned / 2;
    for (int64_t item = first; item < last; item++) {
        const int64_t b = item / n, t = item % n;
        const Line to(a.rope, item);
        const float *cos = a.cos + b * a.angles + t * half, *sin = a.sin + b * a.angles + t * half;
        for (int64_t i = 0; i < half; i++) {
            float first_of_pair = 0, second = 0;
            for (int64_t h = 0; h < a.num_heads; h++) {
                const float *d = a.drope + ((b * a.num_heads + h) * n + t) * a.turned + 2 * i;
                first_of_pair += d[0];
                second += d[1];
            }
            to.put_one(2 * i, first_of_pair * cos[i] + second * sin[i]);
            to.put_one(2 * i + 1, second * cos[i] - first_of_pair * sin[i]);
        }
    }
}
