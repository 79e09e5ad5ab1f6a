// Before the layers and behind them: tokens become rows of x, and hidden states become logits.

#include <math.h>

#include "layers.h"

namespace rq {
namespace {

// Choice: logits of which one thread seeks the likeliest at a time.
constexpr int64_t PIECE = 8192;

// A token's row of the embedding. The tile it lies in is decoded whole: its rows lie side by side.
void embed(const Call &c, const rq_ends &ends, int64_t token, float *tile, float *row) {
    const int64_t width = c.shape.hidden, id = c.step.ids[token];
    decode(matrix_of(ends.embedding), id / TILE, tile);
    memcpy(row, tile + id % TILE * width, width * sizeof(float));
}

// An MTP module's entry: norms of the token's embedding and of its state, side by side.
void join(const Call &c, const rq_ends &ends, int64_t token, const float *embedding, float *row) {
    const int64_t width = c.shape.hidden;
    const float eps = static_cast<float>(c.shape.eps), *state = c.step.states + token * width;
    row_kernels().rms_norm(embedding, ends.embedding_norm, eps, width, row);
    row_kernels().rms_norm(state, ends.state_norm, eps, width, row + width);
    c.space.joint.put(token, row);
}

int64_t num_pieces(const rq_step &step) { return blocks_of(step.num_ids, PIECE); }

// The largest of some logits and its place: the first of equal ones, or -1 if one is not finite.
void find_likeliest(const float *logits, int64_t num, float *most, int64_t *at) {
    float best[LANES], wrong[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        best[lane] = -INFINITY;
        wrong[lane] = 0;
    }
    int64_t i = 0;
    for (; i + LANES <= num; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            const float value = logits[i + lane];
            best[lane] = value > best[lane] ? value : best[lane];
            wrong[lane] += value * 0.0f;  // NaN of what is not finite
        }
    for (; i < num; i++) {
        best[0] = logits[i] > best[0] ? logits[i] : best[0];
        wrong[0] += logits[i] * 0.0f;
    }
    *most = best[0];
    float sum = wrong[0];
    for (int lane = 1; lane < LANES; lane++) {
        *most = best[lane] > *most ? best[lane] : *most;
        sum += wrong[lane];
    }
    *at = -1;
    if (isnan(sum)) return;
    for (i = 0; logits[i] != *most;) i++;
    *at = i;
}

bool spans_fit(const rq_step &step) {
    int64_t num = 0;
    for (int64_t i = 0; i < step.num_spans; i++) {
        const rq_span &span = step.spans[i];
        if (span.num_tokens < 0 || span.first < 0 || span.start < span.first || span.table < 0)
            return false;
        if (span.position < 0 || span.position + span.num_tokens > step.num_positions) return false;
        num += span.num_tokens;
    }
    return num == step.num_tokens;
}

}  // namespace

bool fits_ends(const rq_shape &shape, const rq_ends &ends, const rq_step &step) {
    if (step.num_tokens < 1 || step.num_spans < 1 || step.block_tokens < 1) return false;
    if (!spans_fit(step) || step.hidden == nullptr) return false;
    if (step.ids != nullptr && ends.embedding.columns != shape.hidden) return false;
    for (int64_t t = 0; step.ids != nullptr && t < step.num_tokens; t++)
        if (step.ids[t] < 0 || step.ids[t] >= ends.embedding.rows) return false;
    if (ends.joint.num != 0 && step.states == nullptr) return false;
    if (step.num_rows < 0 || (step.num_rows > 0 && ends.head.num == 0)) return false;
    for (int64_t i = 0; i < step.num_rows; i++) {
        const int64_t least = i ? step.rows[i - 1] + 1 : 0;
        if (step.rows[i] < least || step.rows[i] >= step.num_tokens) return false;
    }
    const bool is_chosen = step.num_rows > 0 && step.likeliest != nullptr;
    return !is_chosen || (step.num_ids > 0 && step.num_ids <= ends.head.rows);
}

void plan_ends(Call &c, const rq_ends &ends) {
    const int64_t width = c.shape.hidden, num_rows = c.step.num_rows;
    Space &space = c.space;
    space.joint.reserve(forms_of(ends.joint), c.step.num_tokens, 2 * width);
    space.scored.reserve(forms_of(ends.head), num_rows, width);
    space.row_of_token.assign(c.step.num_tokens, -1);
    for (int64_t i = 0; i < num_rows; i++) space.row_of_token[c.step.rows[i]] = i;
    if (c.step.logits == nullptr) space.head_logits.reserve(num_rows * ends.head.rows);
    if (c.step.likeliest != nullptr) {
        space.piece_most.reserve(num_rows * num_pieces(c.step));
        space.piece_at.reserve(num_rows * num_pieces(c.step));
    }
    for (Scratch &scratch : space.scratch) {
        scratch.row.reserve(2 * width);
        scratch.decoded.reserve((TILE + 1) * width);
    }
}

void run_entry(Worker &w, Call &c, const rq_ends &ends) {
    const bool is_joint = ends.joint.num != 0;
    const int64_t width = c.shape.hidden, num = c.step.num_tokens;
    if (!is_joint && c.step.ids == nullptr) return;
    Scratch &scratch = c.space.scratch[w.index()];
    const MatrixProduct product{matrix_of(ends.joint), c.space.joint.view(), num, c.x, width, false};
    if (is_joint) fetch_products(w, &product, 1);
    w.each(RQ_ROWS, num, [&](int64_t t) {
        float *row = c.x + t * width, *tile = scratch.decoded, *found = tile + TILE * width;
        if (c.step.ids != nullptr) embed(c, ends, t, tile, is_joint ? found : row);
        if (is_joint) join(c, ends, t, c.step.ids != nullptr ? found : row, scratch.row);
    });
    if (is_joint) run_products(w, RQ_MATRIX, &product, 1);
}

void run_exit(Worker &w, Call &c, const rq_ends &ends) {
    const int64_t width = c.shape.hidden, num_rows = c.step.num_rows, stride = ends.head.rows;
    float *logits = c.step.logits != nullptr ? c.step.logits : c.space.head_logits.data();
    const MatrixProduct product{matrix_of(ends.head), c.space.scored.view(), num_rows, logits, stride,
                                false};
    if (num_rows) fetch_products(w, &product, 1);
    w.each(RQ_ROWS, c.step.num_tokens, [&](int64_t t) {
        float *row = c.x + t * width;
        if (ends.last_norm != nullptr) {
            const float eps = static_cast<float>(c.shape.eps);
            row_kernels().rms_norm(row, ends.last_norm, eps, width, row);
        }
        if (c.space.row_of_token[t] >= 0) c.space.scored.put(c.space.row_of_token[t], row);
    });
    if (!num_rows) return;
    run_products(w, RQ_MATRIX, &product, 1);
    if (c.step.likeliest == nullptr) return;
    const int64_t pieces = num_pieces(c.step);
    w.each(RQ_ROWS, num_rows * pieces, [&](int64_t i) {
        const int64_t first = i % pieces * PIECE, left = c.step.num_ids - first;
        find_likeliest(logits + i / pieces * stride + first, left < PIECE ? left : PIECE,
                       c.space.piece_most + i, c.space.piece_at + i);
    });
}

void finish_exit(Call &c) {
    if (c.step.likeliest == nullptr) return;
    const int64_t pieces = num_pieces(c.step);
    for (int64_t row = 0; row < c.step.num_rows; row++) {
        const float *most = c.space.piece_most + row * pieces;
        const int64_t *at = c.space.piece_at + row * pieces;
        int64_t best = 0;
        bool is_finite = true;
        for (int64_t p = 0; p < pieces; p++) {
            is_finite = is_finite && at[p] >= 0;
            if (most[p] > most[best]) best = p;
        }
        c.step.likeliest[row] = is_finite ? best * PIECE + at[best] : -1;
    }
}

}  // namespace rq
