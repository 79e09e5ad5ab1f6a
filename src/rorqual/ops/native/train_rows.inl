// Norms, SwiGLU, rows moved to experts and back, cross entropy: a row at a time. Included within a
// namespace of each instruction set.

static void norm(const void *arguments, int64_t first, int64_t last) {
    const Norm &a = *static_cast<const Norm *>(arguments);
    const int64_t n = a.width;
    for (int64_t t = first; t < last; t++) {
        const Line x(a.x, t), add(a.add, t), sum(a.sum, t), y(a.y, t), other(a.other, t);
        F squares = all(0);
        for (int64_t i = 0; i < n; i += LANES) {
            F v = x.at(i, n - i);
            if (a.add.p) v = v + add.at(i, n - i);
            if (a.sum.p) sum.put(i, v, n - i);
            squares = squares + v * v;
        }
        const float r = 1.0f / sqrtf(sum_of(squares) / n + static_cast<float>(a.eps));
        a.rstd[t] = r;
        const Line &normed = a.sum.p ? sum : x;
        for (int64_t i = 0; i < n; i += LANES) {
            const F v = normed.at(i, n - i) * r * floats_at(a.weight + i, n - i);
            y.put(i, v, n - i);
            if (a.other.p) other.put(i, v, n - i);
        }
    }
}

static void norm_grad(const void *arguments, int64_t first, int64_t last) {
    const NormGrad &a = *static_cast<const NormGrad *>(arguments);
    const int64_t n = a.width;
    for (int64_t item = first; item < last; item++) {
        float *dweight = a.dweight + item * n;
        memset(dweight, 0, n * sizeof(float));
        const int64_t end = lesser((item + 1) * NORM_ROWS, a.num_rows);
        for (int64_t t = item * NORM_ROWS; t < end; t++) {
            const Line dy(a.dy, t), dother(a.dother, t), dsum(a.dsum, t), x(a.x, t), dx(a.dx, t);
            const float r = a.rstd[t];
            F dot = all(0);
            for (int64_t i = 0; i < n; i += LANES) {
                F d = all(0);
                if (a.dy.p) d = d + dy.at(i, n - i);
                if (a.dother.p) d = d + dother.at(i, n - i);
                const F normed = x.at(i, n - i) * r;
                const Line to({dweight, 0, 0}, 0);
                to.put(i, to.at(i, n - i) + d * normed, n - i);
                dot = dot + d * floats_at(a.weight + i, n - i) * normed;
            }
            const float mean = sum_of(dot) / n;
            for (int64_t i = 0; i < n; i += LANES) {
                F d = all(0);
                if (a.dy.p) d = d + dy.at(i, n - i);
                if (a.dother.p) d = d + dother.at(i, n - i);
                F v = (d * floats_at(a.weight + i, n - i) - x.at(i, n - i) * (r * mean)) * r;
                if (a.dsum.p) v = v + dsum.at(i, n - i);
                dx.put(i, v, n - i);
            }
        }
    }
}

static void swiglu(const void *arguments, int64_t first, int64_t last) {
    const Swiglu &a = *static_cast<const Swiglu *>(arguments);
    for (int64_t t = first; t < last; t++) {
        const Line gate(a.gate, t), up(a.up, t), out(a.out, t);
        const float by = a.by ? a.by[t] : 1.0f;
        for (int64_t i = 0; i < a.width; i += LANES) {
            const int64_t num = a.width - i;
            const F g = gate.at(i, num);
            out.put(i, g * sigmoid(g) * up.at(i, num) * by, num);
        }
    }
}

static void swiglu_grad(const void *arguments, int64_t first, int64_t last) {
    const SwigluGrad &a = *static_cast<const SwigluGrad *>(arguments);
    for (int64_t t = first; t < last; t++) {
        const Line gate(a.gate, t), up(a.up, t), dout(a.dout, t), inner(a.inner, t);
        const Line dgate(a.dgate, t), dup(a.dup, t);
        const float by = a.by ? a.by[t] : 1.0f;
        F dot = all(0);
        for (int64_t i = 0; i < a.width; i += LANES) {
            const int64_t num = a.width - i;
            const F g = gate.at(i, num), u = up.at(i, num), d = dout.at(i, num);
            const F s = sigmoid(g), silu = g * s;
            const F h = silu * u, scaled = d * by;
            dot = dot + d * h;
            if (a.inner.p) inner.put(i, h * by, num);
            dup.put(i, scaled * silu, num);
            dgate.put(i, scaled * u * (s + silu * (1.0f - s)), num);
        }
        if (a.dby) a.dby[t] = sum_of(dot);
    }
}

static void gather(const void *arguments, int64_t first, int64_t last) {
    const Move &a = *static_cast<const Move *>(arguments);
    for (int64_t t = first; t < last; t++) {
        const Line x(a.x, a.index[t] / a.num), out(a.out, t);
        if (a.index[t] < 0)
            memset(out.p, 0, a.width * (out.is_half ? 2 : 4));
        else if (x.is_half == out.is_half)
            memcpy(out.p, x.p, a.width * (x.is_half ? 2 : 4));
        else
            for (int64_t i = 0; i < a.width; i += LANES)
                out.put(i, x.at(i, a.width - i), a.width - i);
    }
}

static void scatter(const void *arguments, int64_t first, int64_t last) {
    const Move &a = *static_cast<const Move *>(arguments);
    for (int64_t t = first; t < last; t++) {
        if (a.index[t] < 0) continue;
        const Line x(a.x, t), out(a.out, a.index[t] / a.num);
        for (int64_t i = 0; i < a.width; i += LANES)
            out.put(i, out.at(i, a.width - i) + x.at(i, a.width - i), a.width - i);
    }
}

static void cross_entropy(const void *arguments, int64_t first, int64_t last) {
    const CrossEntropy &a = *static_cast<const CrossEntropy *>(arguments);
    const int64_t n = a.width, whole = n - n % LANES;
    for (int64_t t = first; t < last; t++) {
        const Line logits(a.logits, t);
        const bool is_row = a.targets[t] >= 0 && a.targets[t] < n;
        if (!is_row || (a.marks && !a.marks[t])) {
            a.losses[t] = is_row ? 0.0f : NAN;
            memset(logits.p, 0, n * (logits.is_half ? 2 : 4));
            continue;
        }
        F highest = all(-INFINITY);
        for (int64_t i = 0; i < whole; i += LANES) highest = most(highest, logits.at(i));
        float top = most_of(highest);
        for (int64_t i = whole; i < n; i++) top = logits.one(i) > top ? logits.one(i) : top;
        F sums = all(0);
        for (int64_t i = 0; i < whole; i += LANES)
            sums = sums + exponential(logits.at(i) - top);
        float total = sum_of(sums);
        for (int64_t i = whole; i < n; i++) total += expf(logits.one(i) - top);
        const float target = logits.one(a.targets[t]), by = 1.0f / total;
        a.losses[t] = top + logf(total) - target;
        for (int64_t i = 0; i < whole; i += LANES)
            logits.put(i, exponential(logits.at(i) - top) * by);
        for (int64_t i = whole; i < n; i++)
            logits.put_one(i, expf(logits.one(i) - top) * by);
        logits.put_one(a.targets[t], expf(target - top) * by - 1.0f);
    }
}
