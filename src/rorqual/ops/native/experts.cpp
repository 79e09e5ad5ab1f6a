// The routed and shared experts, or a dense layer's network: fused, over tokens sorted by expert.

#include <math.h>

#include "layers.h"

namespace rq {
namespace {

// Choice: inner values that a thread makes at a time, a group that shares a scale, or more. Of few
// rows as many as leave each thread some parts: a stretch of memory that begins anew costs a
// microsecond.
constexpr int64_t FEW_ROWS = 16, LEAST_INNER = 32, MOST_INNER = 128, FEW_ROWS_INNER = 256;
constexpr int64_t PARTS_OF_THREAD = 3;
// Rows of an expert at a time: their sums stay in a thread's second cache.
constexpr int64_t ROW_BLOCK = 128;
// Tiles of outputs that a thread makes at a time, of all experts.
constexpr int64_t LEAST_DOWN_TILES = 2, MOST_DOWN_TILES = 8, FEW_ROWS_DOWN_TILES = 32;

// Of `num` networks with so many inner values.
int64_t inner_at_once(const Call &c, int64_t num, int64_t width, int num_threads) {
    if (c.step.num_tokens > FEW_ROWS) return MOST_INNER;
    const int64_t even = num * width / (PARTS_OF_THREAD * num_threads) / LEAST_INNER * LEAST_INNER;
    return even < LEAST_INNER ? LEAST_INNER : even > FEW_ROWS_INNER ? FEW_ROWS_INNER : even;
}

// Of few rows as much as there is, since each expert's part is a stretch of memory.
int64_t down_tiles_at_once(const Call &c, int num_threads) {
    const bool is_few = c.step.num_tokens <= FEW_ROWS;
    const int64_t even = num_tiles(c.shape.hidden) / ((is_few ? 2 : 4) * num_threads);
    const int64_t most = is_few ? FEW_ROWS_DOWN_TILES : MOST_DOWN_TILES;
    return even < LEAST_DOWN_TILES ? LEAST_DOWN_TILES : even > most ? most : even;
}

// Inner values [at_once * group, ...) of `count` rows of x: silu(gate) * up * by, into `inner`.
void make_inner(Scratch &scratch, const Matrix &gate, const Matrix &up, const Activations &x,
                int64_t first, int64_t count, int64_t at_once, int64_t group, const float *by,
                Rows &inner, int64_t inner_row) {
    const int64_t start = group * at_once, left = gate.rows - start;
    const int64_t width = left < at_once ? left : at_once, tiles = num_tiles(width);
    const int64_t most = count < ROW_BLOCK ? count : ROW_BLOCK;
    float *g = scratch.inner, *u = g + most * at_once;
    for (int64_t row = 0; row < count; row += ROW_BLOCK) {
        const int64_t num = count - row < ROW_BLOCK ? count - row : ROW_BLOCK;
        multiply(gate, start / TILE, tiles, x, first + row, num, g, at_once, false);
        multiply(up, start / TILE, tiles, x, first + row, num, u, at_once, false);
        for (int64_t i = 0; i < num; i++) {
            float *values = g + i * at_once;
            row_kernels().swiglu(values, u + i * at_once, by ? by[row + i] : 1.0f, width, values);
            inner.put_part(inner_row + row + i, start, width, values);
        }
    }
}

// Scores of a token's experts, from their logits.
void score(const rq_shape &s, const float *logits, float *scores) {
    if (!s.is_softmax) {
        for (int64_t e = 0; e < s.experts; e++) scores[e] = 1.0f / (1.0f + expf(-logits[e]));
        return;
    }
    float most = -INFINITY, total = 0;
    for (int64_t e = 0; e < s.experts; e++) most = fmaxf(most, logits[e]);
    for (int64_t e = 0; e < s.experts; e++) total += scores[e] = expf(logits[e] - most);
    for (int64_t e = 0; e < s.experts; e++) scores[e] /= total;
}

// The largest of `num` values, the first of equal ones; what was taken is NaN, but not all was.
int64_t best_of(const float *values, int64_t num) {
    int64_t best = 0;
    while (isnan(values[best])) best++;
    for (int64_t i = best + 1; i < num; i++)
        if (values[i] > values[best]) best = i;
    return best;
}

// Experts of groups that are not among the best get -inf.
void keep_best_groups(const rq_shape &s, float *values, float *scratch) {
    const int64_t size = s.experts / s.groups;
    float *of_group = scratch;
    for (int64_t g = 0; g < s.groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; e++) {
            if (values[e] > first) {
                second = first;
                first = values[e];
            } else if (values[e] > second) {
                second = values[e];
            }
        }
        of_group[g] = s.best_of_group > 1 && size > 1 ? first + second : first;
    }
    bool *is_kept = reinterpret_cast<bool *>(of_group + s.groups);
    for (int64_t g = 0; g < s.groups; g++) is_kept[g] = false;
    for (int64_t k = 0; k < s.kept_groups; k++) {
        int64_t best = -1;
        for (int64_t g = 0; g < s.groups; g++)
            if (!is_kept[g] && (best < 0 || of_group[g] > of_group[best])) best = g;
        is_kept[best] = true;
    }
    for (int64_t e = 0; e < s.experts; e++)
        if (!is_kept[e / size]) values[e] = -INFINITY;
}

// A token's experts and gate values (report 2.1.2), as model/router.py chooses them.
void route(const Call &c, Scratch &scratch, const rq_layer &layer, int64_t token) {
    const rq_shape &s = c.shape;
    float *scores = scratch.inner, *values = scores + s.experts;
    score(s, c.space.logits + token * s.experts, scores);
    for (int64_t e = 0; e < s.experts; e++) {
        values[e] = scores[e] + (layer.router_bias ? layer.router_bias[e] : 0.0f);
        if (isnan(values[e])) values[e] = INFINITY;  // the largest, as torch has it
    }
    if (s.groups) keep_best_groups(s, values, values + s.experts);
    int32_t *chosen = c.space.chosen + token * s.chosen;
    float *gate = c.space.gate_values + token * s.chosen, total = 0;
    for (int64_t k = 0; k < s.chosen; k++) {
        const int64_t e = best_of(values, s.experts);
        values[e] = NAN;
        chosen[k] = static_cast<int32_t>(e);
        total += gate[k] = scores[e];
    }
    const float routed = static_cast<float>(s.routed_scale);
    for (int64_t k = 0; k < s.chosen; k++)
        gate[k] = (s.is_normalised ? gate[k] / (total + 1e-20f) : gate[k]) * routed;
}

// (token, expert) pairs by expert, and of one expert by token.
void sort_pairs(const Call &c) {
    const rq_shape &s = c.shape;
    Space &space = c.space;
    const int64_t num = c.step.num_tokens * s.chosen;
    int64_t *offsets = space.offsets;
    for (int64_t e = 0; e <= s.experts + 1; e++) offsets[e] = 0;
    for (int64_t i = 0; i < num; i++) offsets[space.chosen[i] + 2]++;
    for (int64_t e = 2; e <= s.experts + 1; e++) offsets[e] += offsets[e - 1];
    for (int64_t i = 0; i < num; i++) {
        const int64_t place = offsets[space.chosen[i] + 1]++;
        space.pair_token[place] = i / s.chosen;
        space.pair_value[place] = space.gate_values[i];
    }
    space.num_active = 0;
    for (int64_t e = 0; e < s.experts; e++)
        if (offsets[e + 1] > offsets[e]) space.active[space.num_active++] = e;
}

// A layer's shared experts, or the whole of a dense one, which are of another width.
Rows &inner_of(const Call &c, const rq_layer &layer) {
    return layer.expert_gate.num ? c.space.shared_inner : c.space.dense_inner;
}

void run_shared_inner(const Call &c, Scratch &scratch, const rq_layer &layer, int64_t at_once,
                      int64_t item) {
    const int64_t groups = blocks_of(layer.gate.rows, at_once);
    const int64_t row = item / groups * ROW_BLOCK;
    const int64_t left = c.step.num_tokens - row;
    make_inner(scratch, matrix_of(layer.gate), matrix_of(layer.up), c.space.hidden.view(), row,
               left < ROW_BLOCK ? left : ROW_BLOCK, at_once, item % groups, nullptr, inner_of(c, layer),
               row);
}

void run_expert_inner(const Call &c, Scratch &scratch, const rq_layer &layer, int64_t at_once,
                      int64_t item) {
    Space &space = c.space;
    const int64_t groups = blocks_of(layer.expert_gate.rows, at_once);
    const int64_t expert = space.active[item / groups], first = space.offsets[expert];
    const int64_t count = space.offsets[expert + 1] - first;
    // One token has one row, which all its experts read.
    const bool is_one = c.step.num_tokens == 1;
    const Activations x = is_one ? space.hidden.view() : space.expert_hidden.view();
    make_inner(scratch, matrix_of(layer.expert_gate, expert), matrix_of(layer.expert_up, expert), x,
               is_one ? 0 : first, count, at_once, item % groups, space.pair_value + first,
               space.expert_inner, first);
}

// Outputs of tiles [tile, tile + tiles) of all experts, added to x in the order of experts.
void run_down(const Call &c, Scratch &scratch, const rq_layer &layer, int64_t tile, int64_t tiles) {
    const rq_shape &s = c.shape;
    Space &space = c.space;
    const int64_t left = s.hidden - tile * TILE, stride = tiles * TILE;
    const int64_t width = left < stride ? left : stride;
    float *x = c.x + tile * TILE, *sums = scratch.inner;
    for (int64_t a = 0; layer.expert_down.num && a < space.num_active; a++) {
        const int64_t e = space.active[a];
        const Matrix down = matrix_of(layer.expert_down, e);
        for (int64_t row = space.offsets[e]; row < space.offsets[e + 1]; row += ROW_BLOCK) {
            const int64_t more = space.offsets[e + 1] - row, num = more < ROW_BLOCK ? more : ROW_BLOCK;
            multiply(down, tile, tiles, space.expert_inner.view(), row, num, sums, stride, false);
            for (int64_t i = 0; i < num; i++)
                row_kernels().add(sums + i * stride, 1.0f, width, x + space.pair_token[row + i] * s.hidden);
        }
    }
    if (layer.down.num)
        multiply(matrix_of(layer.down), tile, tiles, inner_of(c, layer).view(), 0, c.step.num_tokens, x,
                 s.hidden, true);
}

}  // namespace

void plan_experts(Call &c, const rq_layer *layers, int64_t num_layers, int num_threads) {
    const rq_shape &s = c.shape;
    Space &space = c.space;
    const int64_t num = c.step.num_tokens;
    int forms = 0, inner = 0, expert_inner = 0;
    int64_t dense = 0, shared = 0, expert_width = 0;
    for (int64_t i = 0; i < num_layers; i++) {
        const rq_layer &layer = layers[i];
        forms |= forms_of(layer.expert_gate) | forms_of(layer.expert_up);
        inner |= forms_of(layer.down);
        expert_inner |= forms_of(layer.expert_down);
        if (layer.expert_down.num) expert_width = layer.expert_down.columns;
        if (layer.down.num) (layer.expert_down.num ? shared : dense) = layer.down.columns;
    }
    space.dense_inner.reserve(inner, num, dense);
    space.shared_inner.reserve(inner, num, shared);
    if (expert_width) {
        const int64_t pairs = num * s.chosen;
        if (num > 1) space.expert_hidden.reserve(forms, pairs, s.hidden);
        space.expert_inner.reserve(expert_inner, pairs, expert_width);
        space.logits.reserve(num * s.experts);
        space.gate_values.reserve(pairs);
        space.chosen.reserve(pairs);
        space.offsets.reserve(s.experts + 2);
        space.active.reserve(s.experts);
        space.pair_token.reserve(pairs);
        space.pair_value.reserve(pairs);
    }
    int64_t scratch = 2 * ROW_BLOCK * MOST_INNER;  // more than FEW_ROWS of FEW_ROWS_INNER
    const int64_t routing = 2 * s.experts + 2 * s.groups + 64;
    scratch = scratch > routing ? scratch : routing;
    const int64_t down = ROW_BLOCK * MOST_DOWN_TILES * TILE, few = FEW_ROWS * FEW_ROWS_DOWN_TILES * TILE;
    scratch = scratch > down ? scratch : down;
    scratch = scratch > few ? scratch : few;
    for (int i = 0; i < num_threads; i++) space.scratch[i].inner.reserve(scratch);
}

void fetch_feed_forward(const Worker &w, const Call &c, const rq_layer &layer) {
    if (c.step.num_tokens > FEW_ROWS || layer.gate.num == 0) return;
    const int64_t at_once = inner_at_once(c, 1, layer.gate.rows, w.size());
    const int64_t groups = blocks_of(layer.gate.rows, at_once);
    const int64_t tile = w.first_of(groups) * at_once / TILE;
    fetch_tiles(matrix_of(layer.gate), tile, at_once / TILE);
    fetch_tiles(matrix_of(layer.up), tile, at_once / TILE);
}

void run_feed_forward(Worker &w, Call &c, const rq_layer &layer) {
    const rq_shape &s = c.shape;
    Space &space = c.space;
    Scratch &scratch = space.scratch[w.index()];
    const int64_t num = c.step.num_tokens;
    const int64_t shared_width = inner_at_once(c, 1, layer.gate.rows, w.size());
    const int64_t shared =
        layer.gate.num ? blocks_of(layer.gate.rows, shared_width) * blocks_of(num, ROW_BLOCK) : 0;
    const bool is_sparse = layer.expert_gate.num > 0;
    MatrixProduct router{};
    if (is_sparse)
        router = {matrix_of(layer.router), space.hidden.view(), num, space.logits, s.experts, false};
    const int64_t scored = is_sparse ? num_items(router, w.size()) : 0;
    w.each(RQ_EXPERTS, shared + scored, [&](int64_t item) {
        if (item < shared)
            run_shared_inner(c, scratch, layer, shared_width, item);
        else
            run_item(router, item - shared, w.size());
    });
    if (is_sparse) {
        // Choice: of few tokens one thread routes all, which spares the others a wait.
        const bool is_one = num <= 2;
        if (!is_one) w.each(RQ_ROUTING, num, [&](int64_t t) { route(c, scratch, layer, t); });
        w.each(RQ_ROUTING, 1, [&](int64_t) {
            for (int64_t t = 0; is_one && t < num; t++) route(c, scratch, layer, t);
            sort_pairs(c);
        });
        if (num > 1)
            w.each(RQ_ROUTING, num * s.chosen, [&](int64_t i) {
                space.expert_hidden.copy(i, space.hidden, space.pair_token[i]);
            });
        const int64_t rows = layer.expert_gate.rows;
        const int64_t at_once = inner_at_once(c, space.num_active, rows, w.size());
        w.each(RQ_EXPERTS, space.num_active * blocks_of(rows, at_once),
               [&](int64_t item) { run_expert_inner(c, scratch, layer, at_once, item); });
    }
    const int64_t tiles = num_tiles(s.hidden), down = down_tiles_at_once(c, w.size());
    w.each(RQ_EXPERTS, blocks_of(tiles, down), [&](int64_t item) {
        const int64_t tile = item * down, left = tiles - tile;
        run_down(c, scratch, layer, tile, left < down ? left : down);
    });
}

}  // namespace rq
