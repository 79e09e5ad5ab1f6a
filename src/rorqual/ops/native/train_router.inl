// The router's choice and its gradient: a token at a time. Included within a namespace of each
// instruction set.

constexpr int MOST_EXPERTS = 1024;  // of a router: Python asks for no more

// The place of the highest of n; of equal ones the first.
static int64_t highest_of(const float *values, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (values[i] > values[best]) best = i;
    return best;
}

static void scores_of(const Route &a, const float *logits, float *scores) {
    const int64_t n = a.num_experts;
    if (!a.is_softmax) {
        const Line to({scores, 0, 0}, 0);
        for (int64_t i = 0; i < n; i += LANES)
            to.put(i, sigmoid(floats_at(logits + i, n - i)), n - i);
        return;
    }
    const float top = logits[highest_of(logits, n)];
    float total = 0;
    for (int64_t i = 0; i < n; i++) total += scores[i] = expf(logits[i] - top);
    for (int64_t i = 0; i < n; i++) scores[i] /= total;
}

// Scores of groups that are not among the best become -inf.
static void keep_best_groups(const Route &a, float *chosen) {
    const int64_t size = a.num_experts / a.num_groups;
    float groups[MOST_EXPERTS];
    bool is_kept[MOST_EXPERTS] = {};
    for (int64_t g = 0; g < a.num_groups; g++) {
        const float *of = chosen + g * size;
        float first = -INFINITY, second = -INFINITY;
        for (int64_t i = 0; i < size; i++) {
            if (of[i] > first) {
                second = first;
                first = of[i];
            } else if (of[i] > second) {
                second = of[i];
            }
        }
        groups[g] = a.best_of_group == 1 ? first : first + second;
    }
    for (int64_t k = 0; k < a.kept_groups; k++) {
        const int64_t g = highest_of(groups, a.num_groups);
        is_kept[g] = true;
        groups[g] = -INFINITY;
    }
    for (int64_t g = 0; g < a.num_groups; g++)
        for (int64_t i = 0; i < size && !is_kept[g]; i++) chosen[g * size + i] = -INFINITY;
}

static void route(const void *arguments, int64_t first, int64_t last) {
    const Route &a = *static_cast<const Route *>(arguments);
    const int64_t n = a.num_experts, num = a.num_chosen;
    float chosen[MOST_EXPERTS];
    for (int64_t t = first; t < last; t++) {
        float *scores = a.scores + t * n, *weights = a.weights + t * num;
        int64_t *experts = a.experts + t * num;
        scores_of(a, a.logits + t * n, scores);
        for (int64_t i = 0; i < n; i++) chosen[i] = scores[i] + (a.bias ? a.bias[i] : 0.0f);
        if (a.best_of_group) keep_best_groups(a, chosen);
        float total = 0;
        for (int64_t k = 0; k < num; k++) {
            experts[k] = highest_of(chosen, n);
            chosen[experts[k]] = -INFINITY;
            total += scores[experts[k]];
        }
        const float by = static_cast<float>(a.scale) / (a.is_normalised ? total + 1e-20f : 1.0f);
        for (int64_t k = 0; k < num; k++) weights[k] = scores[experts[k]] * by;
    }
}

static void route_grad(const void *arguments, int64_t first, int64_t last) {
    const Route &a = *static_cast<const Route *>(arguments);
    const int64_t n = a.num_experts, num = a.num_chosen;
    const float scale = static_cast<float>(a.scale);
    for (int64_t t = first; t < last; t++) {
        const float *scores = a.scores + t * n, *dweights = a.dweights + t * num;
        const int64_t *experts = a.experts + t * num;
        float *d = a.dlogits + t * n;
        for (int64_t i = 0; i < n; i++) d[i] = a.dscores ? a.dscores[t * n + i] : 0.0f;
        float total = 1.0f, lost = 0.0f;
        if (a.is_normalised) {
            total = 1e-20f;
            for (int64_t k = 0; k < num; k++) total += scores[experts[k]];
            for (int64_t k = 0; k < num; k++) lost += dweights[k] * (scores[experts[k]] / total);
        }
        for (int64_t k = 0; k < num; k++) d[experts[k]] += scale * (dweights[k] - lost) / total;
        if (a.is_softmax) {
            float mean = 0;
            for (int64_t i = 0; i < n; i++) mean += d[i] * scores[i];
            for (int64_t i = 0; i < n; i++) d[i] = scores[i] * (d[i] - mean);
        } else {
            for (int64_t i = 0; i < n; i++) d[i] *= scores[i] * (1.0f - scores[i]);
        }
    }
}

static void sort_pairs(const void *arguments, int64_t, int64_t) {
    const Sort &a = *static_cast<const Sort *>(arguments);
    memset(a.counts, 0, a.num_experts * sizeof(int64_t));
    for (int64_t i = 0; i < a.num; i++) a.counts[a.experts[i]]++;
    std::unique_ptr<int64_t[]> places(new int64_t[a.num_experts]);
    int64_t place = 0;
    for (int64_t e = 0; e < a.num_experts; e++) {
        places[e] = place;
        const int64_t own = a.counts[e], num = (own + a.whole - 1) / a.whole * a.whole;
        for (int64_t i = own; i < num; i++) a.order[place + i] = -1;
        a.counts[e] = num;
        place += num;
    }
    for (int64_t i = 0; i < a.num; i++) a.order[places[a.experts[i]]++] = i;
}
