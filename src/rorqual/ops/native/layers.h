/* The parts of a layer, each a few phases of a team (layers.cpp has their order). */
#ifndef RORQUAL_LAYERS_INTERNAL_H
#define RORQUAL_LAYERS_INTERNAL_H

#include <stdint.h>

#include <vector>

#include "forms.h"
#include "rorqual_layers.h"
#include "team.h"

namespace rq {

// Memory of one thread.
struct Scratch {
    Buffer<float> row, inner, scores, latent_floats, decoded, expanded, out, most;
    Buffer<uint16_t> latents;
    Buffer<uint32_t> query, weights, keys, values, key_matrix, value_matrix;
};

// A token that attends absorbed, and its chunks of the past.
struct AbsorbedToken {
    int64_t token, span, num_visible, chunk, num_chunks, first_part;
};

// What one call keeps of a step's tokens between phases. Names end with what a row holds.
struct Space {
    Rows hidden, query_latent, query_heads, latent_heads, attended, dense_inner, shared_inner;
    Rows expert_hidden, expert_inner, joint, scored;
    Buffer<float> query_a, latent_a, query, query_absorbed, attention, logits, gate_values;
    Buffer<float> head_logits, piece_most;
    Buffer<int64_t> piece_at;
    Buffer<float> part_out, part_most, part_total;
    Buffer<int32_t> chosen;             // (tokens, chosen experts)
    Buffer<int64_t> offsets, pair_token;  // of each expert's pairs; their tokens
    Buffer<int64_t> active;               // experts that have pairs
    int64_t num_active = 0;
    Buffer<float> pair_value;
    std::vector<AbsorbedToken> absorbed;
    std::vector<int64_t> absorbed_batches;  // the first token of each, and their number
    std::vector<int64_t> expanded;  // spans
    std::vector<int64_t> span_token;  // each span's first
    std::vector<int64_t> absorbed_of_token;  // -1: it attends expanded
    std::vector<int64_t> places;             // of each token's latent in the cache
    std::vector<int64_t> positions;          // of each token's angles
    std::vector<int64_t> row_of_token;       // -1: its logits are not wanted
    std::vector<int64_t> absorbed_rows, absorbed_tokens;  // 0, 1, 2 ...; and which tokens those are
    std::vector<Scratch> scratch;   // of each thread
};

struct Call {
    const rq_shape &shape;
    const rq_step &step;
    Space &space;
    float *x;
};

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline int64_t num_tiles(int64_t rows) { return blocks_of(rows, TILE); }

inline Matrix matrix_of(const rq_stack &stack, int64_t index = 0) {
    const int kind = static_cast<int>(stack.kind);
    const size_t size = row_bytes(kind, stack.columns) * TILE * num_tiles(stack.rows);
    return {kind, stack.rows, stack.columns, stack.packed + index * size};
}

inline int forms_of(const rq_stack &stack) { return stack.num ? form_of(stack.kind) : 0; }

struct MatrixProduct {
    Matrix m;
    Activations x;
    int64_t count;  // rows of x
    float *y;
    int64_t stride_y;
    bool adds;
};

// The pieces of a product that threads take.
int64_t num_items(const MatrixProduct &p, int num_threads);
void run_item(const MatrixProduct &p, int64_t item, int num_threads);

// Products that do not depend on each other, in one phase.
void run_products(Worker &w, rq_part part, const MatrixProduct *products, int64_t num);

// What a phase reads first is asked for in the phase before, where rows are few: that one computes,
// and memory stands still. FETCH_BYTES is what comes in meanwhile.
constexpr int64_t FETCH_BYTES = 1 << 15;

inline void fetch_tiles(const Matrix &m, int64_t tile, int64_t num) {
    const int64_t tile_bytes = row_bytes(m.kind, m.columns) * TILE, all = num * tile_bytes;
    Worker::fetch(m.packed + tile * tile_bytes, all < FETCH_BYTES ? all : FETCH_BYTES);
}

void fetch_products(const Worker &w, const MatrixProduct *products, int64_t num);
void fetch_heads(const Worker &w, const Call &c, const rq_stack &stack);
void fetch_feed_forward(const Worker &w, const Call &c, const rq_layer &layer);

// What stands before the layers and behind them (ends.cpp). The first says whether the step fits.
bool fits_ends(const rq_shape &shape, const rq_ends &ends, const rq_step &step);
void plan_ends(Call &c, const rq_ends &ends);
void run_entry(Worker &w, Call &c, const rq_ends &ends);
void run_exit(Worker &w, Call &c, const rq_ends &ends);
void finish_exit(Call &c);

// Memory for a call and what does not depend on the layer.
void plan_attention(Call &c, int num_threads);
void plan_experts(Call &c, const rq_layer *layers, int64_t num_layers, int num_threads);

// After the queries and the latents of `hidden` were made: the heads' outputs, into `attention`.
void run_attention(Worker &w, Call &c, const rq_layer &layer, const rq_cache &cache);

// Adds what the routed and shared experts (or a dense layer's network) make of `hidden` to x.
void run_feed_forward(Worker &w, Call &c, const rq_layer &layer);

// One latent and rotary key (latent_rank + rope floats) into a slot of the cache, and back.
void write_latent(const rq_shape &shape, const rq_cache &cache, int64_t place, const float *latent);
void read_latents(const rq_shape &shape, const rq_cache &cache, int64_t place, int64_t count,
                  float *latents);

}  // namespace rq
#endif
