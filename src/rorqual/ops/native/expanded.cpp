// Expanded attention: one head, all queries of a span. Keys and values are made of the cached
// latents, KEYS at a time; 16 queries stand side by side. Neither all scores nor all keys exist.

#include <math.h>

#include "attention.h"

namespace rq {
namespace {

constexpr int64_t KEYS = 128, QUERY_TILES = 4;

// A number as computed: bfloat16 in pairs of neighbours (two a word), or a float (a word).
struct Numbers {
    bool is_narrow;
    int kind() const { return is_narrow ? RQ_BF16 : RQ_F32; }
    // Words of so many values.
    int64_t words(int64_t values) const { return is_narrow ? values / 2 : values; }
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Activations rows_of(const uint32_t *words, int64_t width, int64_t stride) {
    Activations x{};
    x.pairs = reinterpret_cast<const uint16_t *>(words);
    x.floats = reinterpret_cast<const float *>(words);
    x.width = width;
    x.stride = stride;
    return x;
}

// One head of one span.
class Head {
  public:
    Head(const Call &c, Scratch &scratch, const rq_cache &cache, int64_t span, int64_t head)
        : c_(c), s_(c.shape), scratch_(scratch), cache_(cache), span_(c.step.spans[span]),
          first_token_(c.space.span_token[span]), head_(head), numbers_{computes_narrow(cache)},
          num_tiles_(num_tiles(span_.num_tokens)), width_(s_.nope + s_.rope) {}

    void run(const rq_layer &layer) {
        pack_queries();
        pack_key_matrix(matrix_of(layer.keys, head_));
        const Matrix values = value_matrix(matrix_of(layer.values, head_));
        const int64_t lanes = num_tiles_ * LANES;
        for (int64_t i = 0; i < lanes; i++) most()[i] = -INFINITY, total()[i] = 0;
        for (int64_t i = 0; i < s_.value * lanes; i++) scratch_.out[i] = 0;
        const int64_t stop = span_.start + span_.num_tokens;
        for (int64_t slot = span_.first; slot < stop; slot += KEYS) {
            const int64_t num = stop - slot < KEYS ? stop - slot : KEYS;
            expand(latents_from(c_, scratch_, cache_, span_, slot, num), num, values);
            attend(slot, num);
        }
        finish();
    }

  private:
    float *most() const { return scratch_.most; }
    float *total() const { return scratch_.most + num_tiles_ * LANES; }

    // Tiles of 16 queries, times the scale of scores.
    void pack_queries() {
        const float by = static_cast<float>(s_.softmax_scale);
        const int64_t words = numbers_.words(width_);
        float *row = scratch_.row;
        uint32_t *narrow_row = scratch_.weights;
        for (int64_t q = 0; q < num_tiles_ * LANES; q++) {
            const bool is_there = q < span_.num_tokens;
            const float *query = c_.space.query + ((first_token_ + q) * s_.heads + head_) * width_;
            for (int64_t i = 0; i < width_; i++) row[i] = is_there ? query[i] * by : 0.0f;
            const uint32_t *from = reinterpret_cast<const uint32_t *>(row);
            if (numbers_.is_narrow) {
                row_kernels().narrow(row, width_, reinterpret_cast<uint16_t *>(narrow_row));
                from = narrow_row;
            }
            uint32_t *tile = scratch_.query + q / LANES * words * LANES + q % LANES;
            for (int64_t i = 0; i < words; i++) tile[i * LANES] = from[i];
        }
    }

    // W_uk of the head (latent_rank, nope), as tiles of 16 of its columns.
    void pack_key_matrix(const Matrix &m) {
        const int64_t padded = round_up(s_.nope, LANES);
        const int64_t tile_words = numbers_.words(s_.latent_rank) * LANES;
        float *rows = scratch_.decoded;
        for (int64_t c = 0; c < s_.latent_rank; c += TILE) {
            decode(m, c / TILE, rows);
            const int64_t left = s_.latent_rank - c, num = left < TILE ? left : TILE;
            spread(rows, num, s_.nope, padded);
            for (int64_t n = 0; n < padded; n += LANES) {
                uint32_t *tile = scratch_.key_matrix + n / LANES * tile_words + numbers_.words(c) * LANES;
                if (numbers_.is_narrow)
                    row_kernels().pair(rows + n, padded, num, tile);
                else
                    for (int64_t r = 0; r < num; r++)
                        memcpy(tile + r * LANES, rows + r * padded + n, LANES * sizeof(float));
            }
        }
    }

    // Rows of `width` floats come to lie `padded` floats apart.
    static void spread(float *rows, int64_t num, int64_t width, int64_t padded) {
        if (width == padded) return;
        for (int64_t r = num - 1; r >= 0; r--) {
            memmove(rows + r * padded, rows + r * width, width * sizeof(float));
            for (int64_t i = width; i < padded; i++) rows[r * padded + i] = 0;
        }
    }

    // W_uv of the head (value, latent_rank), in the numbers of the computation.
    Matrix value_matrix(const Matrix &m) {
        if (m.kind == numbers_.kind()) return m;
        const int64_t rank = s_.latent_rank, words = numbers_.words(rank);
        for (int64_t t = 0; t < num_tiles(m.rows); t++) {
            decode(m, t, scratch_.decoded);
            for (int64_t r = 0; r < TILE; r++) {
                const float *row = scratch_.decoded + r * rank;
                const uint32_t *from = reinterpret_cast<const uint32_t *>(row);
                if (numbers_.is_narrow) {
                    row_kernels().narrow(row, rank, reinterpret_cast<uint16_t *>(scratch_.weights.data()));
                    from = scratch_.weights;
                }
                uint32_t *tile = scratch_.value_matrix + t * words * TILE + r;
                for (int64_t i = 0; i < words; i++) tile[i * TILE] = from[i];
            }
        }
        return {numbers_.kind(), m.rows, m.columns,
                reinterpret_cast<const uint8_t *>(scratch_.value_matrix.data())};
    }

    // Keys (slots, nope + rope) and values (value, slots) of some slots.
    void expand(const Latents &latents, int64_t num, const Matrix &values) {
        const int64_t width = s_.latent_rank + s_.rope;
        const Activations x = latents.view(s_.latent_rank, width);
        const int64_t padded = round_up(s_.nope, LANES);
        const Matrix keys{numbers_.kind(), padded, s_.latent_rank,
                          reinterpret_cast<const uint8_t *>(scratch_.key_matrix.data())};
        float *made = scratch_.expanded;
        multiply(keys, 0, padded / LANES, x, 0, num, made, padded, false);
        uint16_t *narrow_keys = reinterpret_cast<uint16_t *>(scratch_.keys.data());
        float *wide_keys = reinterpret_cast<float *>(scratch_.keys.data());
        for (int64_t s = 0; s < num; s++) {
            const int64_t at = s * width_;
            if (numbers_.is_narrow) {
                row_kernels().narrow(made + s * padded, s_.nope, narrow_keys + at);
                memcpy(narrow_keys + at + s_.nope, latents.pairs + s * width + s_.latent_rank,
                       s_.rope * sizeof(uint16_t));
            } else {
                memcpy(wide_keys + at, made + s * padded, s_.nope * sizeof(float));
                memcpy(wide_keys + at + s_.nope, latents.floats + s * width + s_.latent_rank,
                       s_.rope * sizeof(float));
            }
        }
        const int64_t value_width = round_up(s_.value, LANES);
        multiply(values, 0, value_width / LANES, x, 0, num, made, value_width, false);
        turn_values(made, value_width, num);
    }

    // Rows of values (slots, value) become columns, pairs of slots in a word where narrow.
    void turn_values(const float *made, int64_t value_width, int64_t num) {
        const int64_t stride = numbers_.words(KEYS);
        for (int64_t v = 0; v < s_.value; v += LANES) {
            const int64_t lanes = s_.value - v < LANES ? s_.value - v : LANES;
            const uint32_t *words = reinterpret_cast<const uint32_t *>(made + v);
            int64_t step = value_width, rows = num;
            if (numbers_.is_narrow) {
                row_kernels().pair(made + v, value_width, num, scratch_.weights);
                words = scratch_.weights;
                step = LANES;
                rows = (num + 1) / 2;
            }
            for (int64_t lane = 0; lane < lanes; lane++)
                for (int64_t s = 0; s < rows; s++)
                    scratch_.values[(v + lane) * stride + s] = words[s * step + lane];
        }
    }

    void attend(int64_t slot, int64_t num) {
        // The first query that sees the first of these slots.
        const int64_t query = slot > span_.start ? slot - span_.start : 0;
        const int64_t first = query / LANES / QUERY_TILES * QUERY_TILES;
        for (int64_t tile = first; tile < num_tiles_; tile += QUERY_TILES) {
            const int64_t left = num_tiles_ - tile;
            attend_tiles(slot, num, tile, left < QUERY_TILES ? left : QUERY_TILES);
        }
    }

    // Sums (value, queries) of the tiles that are multiplied together, apart from others': rows that
    // lie far apart would push each other out of the first cache.
    float *outputs_of(int64_t tile) const { return scratch_.out + tile * LANES * s_.value; }

    void attend_tiles(int64_t slot, int64_t num, int64_t tile, int64_t tiles) {
        const int64_t stride = tiles * LANES, all = num_tiles_ * LANES;
        float *scores = scratch_.scores, *out = outputs_of(tile);
        const Matrix queries{numbers_.kind(), all, width_,
                             reinterpret_cast<const uint8_t *>(scratch_.query.data())};
        multiply(queries, tile, tiles, rows_of(scratch_.keys, width_, width_), 0, num, scores,
                 stride, false);
        const int64_t even = numbers_.is_narrow ? round_up(num, 2) : num;
        const int64_t tile_words = numbers_.words(even) * LANES;
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t lane = (tile + t) * LANES;
            float *of_tile = scores + t * LANES, change[LANES];
            hide(slot, num, lane, of_tile, stride);
            row_kernels().weigh(of_tile, stride, num, most() + lane, total() + lane, change);
            bool is_changed = false;
            for (int i = 0; i < LANES; i++) is_changed |= change[i] != 1.0f;
            if (is_changed) row_kernels().scale(out + t * LANES, stride, s_.value, change);
            uint32_t *weights = scratch_.weights + t * tile_words;
            if (numbers_.is_narrow)
                row_kernels().pair(of_tile, stride, num, weights);
            else
                for (int64_t s = 0; s < num; s++)
                    memcpy(weights + s * LANES, of_tile + s * stride, LANES * sizeof(float));
        }
        const Matrix weights{numbers_.kind(), stride, even,
                             reinterpret_cast<const uint8_t *>(scratch_.weights.data())};
        multiply(weights, 0, tiles, rows_of(scratch_.values, even, KEYS), 0, s_.value,
                 out, stride, true);
    }

    // Slots that come after a query are not seen by it. Lanes beyond the last query are as the last.
    void hide(int64_t slot, int64_t num, int64_t lane, float *scores, int64_t stride) const {
        if (slot + num - 1 <= span_.start + lane) return;
        for (int64_t s = 0; s < num; s++)
            for (int64_t i = 0; i < LANES; i++)
                if (slot + s > span_.start + lane + i) scores[s * stride + i] = -INFINITY;
    }

    void finish() {
        for (int64_t q = 0; q < span_.num_tokens; q++) {
            const float by = 1.0f / total()[q];
            const int64_t tile = q / LANES / QUERY_TILES * QUERY_TILES, left = num_tiles_ - tile;
            const int64_t stride = (left < QUERY_TILES ? left : QUERY_TILES) * LANES;
            const float *out = outputs_of(tile) + q - tile * LANES;
            float *y = c_.space.attention + ((first_token_ + q) * s_.heads + head_) * s_.value;
            for (int64_t v = 0; v < s_.value; v++) y[v] = out[v * stride] * by;
        }
    }

    const Call &c_;
    const rq_shape &s_;
    Scratch &scratch_;
    const rq_cache &cache_;
    const rq_span &span_;
    const int64_t first_token_, head_;
    const Numbers numbers_;
    const int64_t num_tiles_, width_;  // of queries
};

}  // namespace

Latents latents_from(const Call &c, Scratch &scratch, const rq_cache &cache, const rq_span &span,
                     int64_t slot, int64_t num) {
    const rq_shape &s = c.shape;
    const int64_t width = s.latent_rank + s.rope, size = c.step.block_tokens;
    const int64_t *blocks = c.step.tables + span.table;
    const bool is_narrow = computes_narrow(cache);
    const bool is_in_place = cache.kind == (is_narrow ? RQ_CACHE_BFLOAT16 : RQ_CACHE_FLOAT32);
    const int64_t place = blocks[slot / size] * size + slot % size;
    int64_t count = size - slot % size;
    while (count < num && blocks[(slot + count) / size] * size == place + count) count += size;
    if (is_in_place && count >= num) {
        const uint16_t *pairs = static_cast<const uint16_t *>(cache.planes[0]) + place * width;
        const float *floats = static_cast<const float *>(cache.planes[0]) + place * width;
        return {is_narrow, pairs, floats};
    }
    for (int64_t done = 0; done < num; done += count) {
        const int64_t at = slot + done, left = size - at % size;
        const int64_t from = blocks[at / size] * size + at % size;
        count = num - done < left ? num - done : left;
        if (is_in_place && is_narrow)
            memcpy(scratch.latents + done * width,
                   static_cast<const uint16_t *>(cache.planes[0]) + from * width,
                   count * width * sizeof(uint16_t));
        else
            read_latents(s, cache, from, count, scratch.latent_floats + done * width);
    }
    if (is_narrow && !is_in_place)
        row_kernels().narrow(scratch.latent_floats, num * width, scratch.latents);
    return {is_narrow, scratch.latents, scratch.latent_floats};
}

void reserve_expanded(const rq_shape &s, Scratch &scratch, int64_t num_queries) {
    const int64_t width = s.nope + s.rope, lanes = round_up(num_queries, LANES);
    const int64_t nope = round_up(s.nope, LANES), value = round_up(s.value, LANES);
    const int64_t latent = s.latent_rank + s.rope, rank = round_up(s.latent_rank, LANES);
    scratch.latent_floats.reserve(KEYS * latent);
    scratch.latents.reserve(KEYS * latent);
    scratch.query.reserve(lanes * width);
    scratch.scores.reserve(KEYS * QUERY_TILES * LANES);
    int64_t weights = KEYS * QUERY_TILES * LANES;
    weights = weights > width ? weights : width;
    scratch.weights.reserve(weights > rank ? weights : rank);
    scratch.decoded.reserve(TILE * (nope > rank ? nope : rank));
    scratch.key_matrix.reserve(nope * rank);
    scratch.value_matrix.reserve(value * rank);
    scratch.expanded.reserve(KEYS * (nope > value ? nope : value));
    scratch.keys.reserve(KEYS * width);
    scratch.values.reserve(value * KEYS);
    scratch.out.reserve(value * lanes);
    scratch.most.reserve(2 * lanes);
}

void attend_expanded(const Call &c, Scratch &scratch, const rq_layer &layer, const rq_cache &cache,
                     int64_t span, int64_t head) {
    Head(c, scratch, cache, span, head).run(layer);
}

}  // namespace rq
