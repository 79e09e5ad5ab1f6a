// A step's tokens through layers: the order of a layer's parts, and what is between them.

#include <stdlib.h>

#include <mutex>
#include <new>

#include "layers.h"

namespace rq {
namespace {

// Choice: of so many rows of x the forms stay in a processor's second cache.
constexpr int64_t ROW_BLOCK = 256;
// Choice: a thread takes about so many bytes of weights at a time where rows are few.
constexpr int64_t CHUNK_BYTES = 1 << 16;
constexpr int64_t FEW_ROWS = 16;
// Choice: where rows are many, what is made of them is used for so many tiles.
constexpr int64_t MANY_ROWS_TILES = 8;

// Tiles that a thread takes at a time.
int64_t tiles_at_once(const MatrixProduct &p, int num_threads) {
    const int64_t tiles = num_tiles(p.m.rows);
    if (p.count > FEW_ROWS) return MANY_ROWS_TILES;
    const int64_t tile_bytes = row_bytes(p.m.kind, p.m.columns) * TILE;
    int64_t at_once = CHUNK_BYTES / tile_bytes;
    const int64_t even = (tiles + 3 * num_threads - 1) / (3 * num_threads);
    at_once = at_once < even ? at_once : even;
    return at_once < 1 ? 1 : at_once;
}

// Pairs of neighbours turn; firsts come to stand before seconds, as in model/rope.py.
void rotate(float *x, const float *cos, const float *sin, int64_t width, float *scratch) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        scratch[i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
        scratch[half + i] = x[2 * i + 1] * cos[i] + x[2 * i] * sin[i];
    }
    memcpy(x, scratch, width * sizeof(float));
}

// Norms the residual stream into `hidden`.
void norm_hidden(Worker &w, Call &c, const float *weight) {
    const int64_t width = c.shape.hidden;
    float *row = c.space.scratch[w.index()].row;
    w.each(RQ_ROWS, c.step.num_tokens, [&](int64_t t) {
        row_kernels().rms_norm(c.x + t * width, weight, static_cast<float>(c.shape.eps), width, row);
        c.space.hidden.put(t, row);
    });
}

// A token's latent becomes what the cache holds; its query's latent is normed.
void finish_latents(Worker &w, Call &c, const rq_layer &layer, const rq_cache &cache) {
    const rq_shape &s = c.shape;
    const int64_t width = s.latent_rank + s.rope;
    const float eps = static_cast<float>(s.latent_eps);
    float *row = c.space.scratch[w.index()].row;
    w.each(RQ_ROWS, c.step.num_tokens, [&](int64_t t) {
        if (s.query_rank) {
            const float *query = c.space.query_a + t * s.query_rank;
            row_kernels().rms_norm(query, layer.query_norm, eps, s.query_rank, row);
            c.space.query_latent.put(t, row);
        }
        float *latent = c.space.latent_a + t * width;
        row_kernels().rms_norm(latent, layer.latent_norm, eps, s.latent_rank, latent);
        const int64_t angle = c.space.positions[t] * (s.rope / 2);
        const float *cos = c.step.cos + angle, *sin = c.step.sin + angle;
        rotate(latent + s.latent_rank, cos, sin, s.rope, row);
        write_latent(s, cache, c.space.places[t], latent);
    });
}

// Turns the queries, and brings those that attend absorbed into the forms of their products.
void finish_queries(Worker &w, Call &c) {
    const rq_shape &s = c.shape;
    const int64_t width = s.nope + s.rope;
    float *row = c.space.scratch[w.index()].row;
    w.each(RQ_ROWS, c.step.num_tokens, [&](int64_t t) {
        const int64_t angle = c.space.positions[t] * (s.rope / 2);
        const float *cos = c.step.cos + angle, *sin = c.step.sin + angle;
        const int64_t place = c.space.absorbed_of_token[t];
        for (int64_t h = 0; h < s.heads; h++) {
            float *query = c.space.query + (t * s.heads + h) * width;
            rotate(query + s.nope, cos, sin, s.rope, row);
            if (place >= 0) c.space.query_heads.put(place * s.heads + h, query);
        }
    });
}

void finish_attention(Worker &w, Call &c) {
    const int64_t width = c.shape.heads * c.shape.value;
    w.each(RQ_ROWS, c.step.num_tokens,
           [&](int64_t t) { c.space.attended.put(t, c.space.attention + t * width); });
}

void run_layer(Worker &w, Call &c, const rq_layer &layer, const rq_cache &cache) {
    const rq_shape &s = c.shape;
    Space &space = c.space;
    const int64_t num = c.step.num_tokens, query_width = s.heads * (s.nope + s.rope);
    const Activations hidden = space.hidden.view();
    MatrixProduct down[2] = {
        {matrix_of(layer.latent_a), hidden, num, space.latent_a, s.latent_rank + s.rope, false},
        {matrix_of(layer.query_b), hidden, num, space.query, query_width, false},
    };
    if (s.query_rank)
        down[1] = {matrix_of(layer.query_a), hidden, num, space.query_a, s.query_rank, false};
    const MatrixProduct up = {matrix_of(layer.query_b), space.query_latent.view(), num, space.query,
                              query_width, false};
    const MatrixProduct out = {matrix_of(layer.output), space.attended.view(), num, c.x, s.hidden,
                               true};
    fetch_products(w, down, 2);
    norm_hidden(w, c, layer.input_norm);
    run_products(w, RQ_MATRIX, down, 2);
    if (s.query_rank) fetch_products(w, &up, 1);
    finish_latents(w, c, layer, cache);
    if (s.query_rank) run_products(w, RQ_MATRIX, &up, 1);
    fetch_heads(w, c, layer.keys);
    finish_queries(w, c);
    run_attention(w, c, layer, cache);
    fetch_products(w, &out, 1);
    finish_attention(w, c);
    run_products(w, RQ_MATRIX, &out, 1);
    fetch_feed_forward(w, c, layer);
    norm_hidden(w, c, layer.mlp_norm);
    run_feed_forward(w, c, layer);
}

// Each token's place in the cache and its angles.
void plan_tokens(Call &c) {
    const int64_t size = c.step.block_tokens;
    c.space.places.clear();
    c.space.positions.clear();
    for (int64_t i = 0; i < c.step.num_spans; i++) {
        const rq_span &span = c.step.spans[i];
        for (int64_t slot = span.start; slot < span.start + span.num_tokens; slot++) {
            c.space.places.push_back(c.step.tables[span.table + slot / size] * size + slot % size);
            c.space.positions.push_back(span.position + slot - span.start);
        }
    }
}

void plan(Call &c, const rq_ends &ends, const rq_layer *layers, int64_t num_layers, int num_threads) {
    const rq_shape &s = c.shape;
    Space &space = c.space;
    const int64_t num = c.step.num_tokens;
    int hidden = 0, query = 0, heads = 0, latents = 0, attended = 0;
    for (int64_t i = 0; i < num_layers; i++) {
        const rq_layer &layer = layers[i];
        hidden |= forms_of(layer.latent_a) | forms_of(layer.router) | forms_of(layer.gate) |
                  forms_of(layer.up) | forms_of(layer.expert_gate) | forms_of(layer.expert_up);
        if (s.query_rank) {
            hidden |= forms_of(layer.query_a);
            query |= forms_of(layer.query_b);
        } else {
            hidden |= forms_of(layer.query_b);
        }
        heads |= forms_of(layer.keys);
        latents |= forms_of(layer.values);
        attended |= forms_of(layer.output);
    }
    plan_tokens(c);
    plan_attention(c, num_threads);
    const int64_t absorbed = static_cast<int64_t>(space.absorbed.size());
    space.hidden.reserve(hidden, num, s.hidden);
    space.query_latent.reserve(query, num, s.query_rank);
    space.query_heads.reserve(heads, absorbed * s.heads, s.nope);
    space.latent_heads.reserve(latents, absorbed * s.heads, s.latent_rank);
    space.attended.reserve(attended, num, s.heads * s.value);
    space.query_a.reserve(num * s.query_rank);
    space.latent_a.reserve(num * (s.latent_rank + s.rope));
    space.query.reserve(num * s.heads * (s.nope + s.rope));
    space.query_absorbed.reserve(absorbed * s.heads * s.latent_rank);
    space.attention.reserve(num * s.heads * s.value);
    plan_experts(c, layers, num_layers, num_threads);
    int64_t row = s.hidden > s.query_rank ? s.hidden : s.query_rank;
    row = row > s.latent_rank ? row : s.latent_rank;
    row = row > s.nope + s.rope ? row : s.nope + s.rope;
    for (Scratch &scratch : space.scratch) scratch.row.reserve(row > s.rope ? row : s.rope);
    plan_ends(c, ends);
}

}  // namespace

int64_t num_items(const MatrixProduct &p, int num_threads) {
    return blocks_of(num_tiles(p.m.rows), tiles_at_once(p, num_threads)) *
           blocks_of(p.count, ROW_BLOCK);
}

void run_item(const MatrixProduct &p, int64_t item, int num_threads) {
    const int64_t at_once = tiles_at_once(p, num_threads);
    const int64_t num_chunks = blocks_of(num_tiles(p.m.rows), at_once);
    const int64_t tile = item % num_chunks * at_once, row = item / num_chunks * ROW_BLOCK;
    const int64_t left = num_tiles(p.m.rows) - tile, rows = p.count - row;
    multiply(p.m, tile, left < at_once ? left : at_once, p.x, row, rows < ROW_BLOCK ? rows : ROW_BLOCK,
             p.y + row * p.stride_y + tile * TILE, p.stride_y, p.adds);
}

void fetch_products(const Worker &w, const MatrixProduct *products, int64_t num) {
    if (products[0].count > FEW_ROWS) return;
    int64_t total = 0, p = 0;
    for (int64_t i = 0; i < num; i++) total += num_items(products[i], w.size());
    int64_t item = w.first_of(total);
    for (int64_t items; item >= (items = num_items(products[p], w.size())); p++) item -= items;
    const Matrix &m = products[p].m;
    const int64_t at_once = tiles_at_once(products[p], w.size());
    const int64_t tile = item % blocks_of(num_tiles(m.rows), at_once) * at_once;
    fetch_tiles(m, tile, num_tiles(m.rows) - tile);
}

void run_products(Worker &w, rq_part part, const MatrixProduct *products, int64_t num) {
    int64_t total = 0;
    for (int64_t p = 0; p < num; p++) total += num_items(products[p], w.size());
    w.each(part, total, [&](int64_t item) {
        int64_t p = 0;
        for (int64_t items; item >= (items = num_items(products[p], w.size())); p++) item -= items;
        run_item(products[p], item, w.size());
    });
}

}  // namespace rq

struct rq_layers {
    rq_shape shape;
    rq_ends ends;
    std::vector<rq_layer> layers;
    rq::Space space;
    std::mutex mutex;
};

extern "C" {

rq_layers *rq_layers_make(const rq_shape *shape, const rq_ends *ends, const rq_layer *layers,
                          int64_t num_layers) {
    try {
        rq_layers *made = new rq_layers;
        made->shape = *shape;
        made->ends = *ends;
        made->layers.assign(layers, layers + num_layers);
        return made;
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

void rq_layers_free(rq_layers *layers) { delete layers; }

int rq_layers_run(rq_layers *layers, const rq_cache *caches, const rq_step *step) {
    if (!rq::fits_ends(layers->shape, layers->ends, *step)) return RQ_BAD_SHAPE;
    std::lock_guard<std::mutex> lock(layers->mutex);
    rq::set_threads(static_cast<int>(step->num_threads));
    rq::Call call{layers->shape, *step, layers->space, step->hidden};
    const int64_t num_layers = static_cast<int64_t>(layers->layers.size());
    const int threads = rq::num_threads();
    try {
        rq::plan(call, layers->ends, layers->layers.data(), num_layers, threads);
    } catch (const std::bad_alloc &) {
        return RQ_NO_MEMORY;
    }
    const bool is_done = rq::together(threads, [&](rq::Worker &w) {
        rq::run_entry(w, call, layers->ends);
        for (int64_t i = 0; i < num_layers; i++) rq::run_layer(w, call, layers->layers[i], caches[i]);
        rq::run_exit(w, call, layers->ends);
    });
    if (!is_done) return RQ_NO_MEMORY;
    rq::finish_exit(call);
    return RQ_OK;
}
}
