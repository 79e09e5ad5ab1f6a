// Attention over the paged cache, in place. Which tokens attend how; absorbed attention.
//
// Absorbed, 16 heads stand side by side: their queries are a tile, the cached latents the rows that
// it is multiplied with, and the latents are summed by the weights that come of it.

#include <math.h>

#include "attention.h"

namespace rq {
namespace {

// Choice: a chunk is one thread's work. At most so many chunks of a token's past are put together
// at the end; their size depends on the past alone, and so do the sums.
constexpr int64_t MOST_CHUNKS = 16, SMALLEST_CHUNK = 64;
// Choice: bytes of the sums of all chunks that exist at once. Of DeepSeek-V3 a token has 4 MB of
// them, and hundreds of tokens may attend absorbed in a step.
constexpr int64_t MOST_PART_BYTES = 32 << 20;
// Latents whose scores exist at once.
constexpr int64_t BLOCK = 128;

int64_t num_groups(const rq_shape &s) { return (s.heads + LANES - 1) / LANES; }

// The queries of up to 16 heads as a tile, times the scale of scores.
void pack_queries(const Call &c, Scratch &scratch, const AbsorbedToken &token, int64_t place,
                  int64_t group, bool is_narrow) {
    const rq_shape &s = c.shape;
    const int64_t width = s.latent_rank + s.rope, words = is_narrow ? width / 2 : width;
    const float by = static_cast<float>(s.softmax_scale);
    for (int64_t lane = 0; lane < LANES; lane++) {
        const int64_t h = group * LANES + lane;
        float *row = scratch.latent_floats;
        for (int64_t i = 0; i < width; i++) row[i] = 0;
        if (h < s.heads) {
            const float *latent = c.space.query_absorbed + (place * s.heads + h) * s.latent_rank;
            row_kernels().add(latent, by, s.latent_rank, row);
            const float *query = c.space.query + (token.token * s.heads + h) * (s.nope + s.rope);
            row_kernels().add(query + s.nope, by, s.rope, row + s.latent_rank);
        }
        const uint32_t *from = reinterpret_cast<const uint32_t *>(row);
        if (is_narrow) {
            row_kernels().narrow(row, width, scratch.latents);
            from = reinterpret_cast<const uint32_t *>(scratch.latents.data());
        }
        uint32_t *tile = scratch.query + lane;
        for (int64_t i = 0; i < words; i++) tile[i * LANES] = from[i];
    }
}

struct Sums {
    float *out, *most, *total;  // (LANES, latent_rank), (LANES), (LANES)
};

// `next`: latents that are attended after these, if it is known where they lie.
void attend_rows(const Call &c, Scratch &scratch, const Latents &rows, int64_t count, Sums sums,
                 const uint16_t *next) {
    const int64_t rank = c.shape.latent_rank, width = rank + c.shape.rope;
    const Matrix queries{rows.is_narrow ? RQ_BF16 : RQ_F32, LANES, width,
                         reinterpret_cast<const uint8_t *>(scratch.query.data())};
    float change[LANES];
    float *scores = scratch.scores;
    multiply(queries, 0, 1, rows.view(width, width), 0, count, scores, LANES, false);
    row_kernels().weigh(scores, LANES, count, sums.most, sums.total, change);
    for (int64_t lane = 0; lane < LANES; lane++)
        if (change[lane] != 1.0f)
            for (int64_t i = 0; i < rank; i++) sums.out[lane * rank + i] *= change[lane];
    if (rows.is_narrow) {
        row_kernels().pair(scores, LANES, count, scratch.weights);
        row_kernels().sum_pairs(scratch.weights, rows.pairs, width, count, rank, sums.out, next);
    } else {
        row_kernels().sum_floats(scores, rows.floats, width, count, rank, sums.out);
    }
}

// Where the latents of a slot and those behind it lie, if they are read in place and lie together.
const uint16_t *place_of(const Call &c, const rq_cache &cache, const rq_span &span, int64_t slot) {
    if (cache.kind != RQ_CACHE_BFLOAT16) return nullptr;
    const int64_t size = c.step.block_tokens;
    const int64_t place = c.step.tables[span.table + slot / size] * size + slot % size;
    return static_cast<const uint16_t *>(cache.planes[0]) + place * (c.shape.latent_rank + c.shape.rope);
}

void attend_chunk(const Call &c, Scratch &scratch, const rq_cache &cache, int64_t place,
                  int64_t group, int64_t chunk) {
    const AbsorbedToken &token = c.space.absorbed[place];
    const rq_span &span = c.step.spans[token.span];
    const int64_t part = token.first_part + group * token.num_chunks + chunk;
    const int64_t rank = c.shape.latent_rank;
    const Sums sums{c.space.part_out + part * LANES * rank, c.space.part_most + part * LANES,
                    c.space.part_total + part * LANES};
    for (int64_t i = 0; i < LANES * rank; i++) sums.out[i] = 0;
    for (int lane = 0; lane < LANES; lane++) {
        sums.most[lane] = -INFINITY;
        sums.total[lane] = 0;
    }
    const bool is_narrow = computes_narrow(cache);
    pack_queries(c, scratch, token, place, group, is_narrow);
    const int64_t begin = chunk * token.chunk;
    const int64_t left = token.num_visible - begin, end = begin + (left < token.chunk ? left : token.chunk);
    for (int64_t i = begin; i < end; i += BLOCK) {
        const int64_t num = end - i < BLOCK ? end - i : BLOCK;
        const Latents rows = latents_from(c, scratch, cache, span, span.first + i, num);
        const int64_t next = i + num;
        attend_rows(c, scratch, rows, num, sums,
                    next < end ? place_of(c, cache, span, span.first + next) : nullptr);
    }
}

// The chunks of a head's sums, as one row of latents.
void merge_chunks(const Call &c, const AbsorbedToken &token, int64_t head, float *row) {
    const int64_t rank = c.shape.latent_rank, lane = head % LANES;
    const int64_t first = token.first_part + head / LANES * token.num_chunks;
    float most = -INFINITY, total = 0;
    for (int64_t i = first; i < first + token.num_chunks; i++)
        most = fmaxf(most, c.space.part_most[i * LANES + lane]);
    for (int64_t k = 0; k < rank; k++) row[k] = 0;
    for (int64_t i = first; i < first + token.num_chunks; i++) {
        const float by = expf(c.space.part_most[i * LANES + lane] - most);
        total += by * c.space.part_total[i * LANES + lane];
        row_kernels().add(c.space.part_out + (i * LANES + lane) * rank, by, rank, row);
    }
    const float by = 1.0f / total;
    for (int64_t k = 0; k < rank; k++) row[k] *= by;
}

// Choice: a head's matrix is one thread's work, and few heads are split.
int64_t splits_of_head(const Worker &w, const Call &c, const rq_stack &stack) {
    const int64_t tiles = num_tiles(stack.rows);
    return c.shape.heads >= 4 * w.size() ? 1 : tiles < 4 ? tiles : 4;
}

// One product a head: every `heads`-th row of x with that head's matrix. The outputs of token i are
// those of row rows[i] of y, `stride` values from one to the next.
void run_heads(Worker &w, const Call &c, const rq_stack &stack, const Rows &x, float *y,
               const std::vector<int64_t> &rows, int64_t stride) {
    const rq_shape &s = c.shape;
    const int64_t num = static_cast<int64_t>(rows.size());
    const int64_t tiles = num_tiles(stack.rows), splits = splits_of_head(w, c, stack);
    w.each(RQ_ATTENTION, s.heads * splits, [&](int64_t item) {
        const int64_t head = item / splits, split = item % splits;
        const int64_t first = tiles * split / splits, last = tiles * (split + 1) / splits;
        const Matrix m = matrix_of(stack, head);
        float *to = y + head * stack.rows + first * TILE;
        for (int64_t i = 0, next; i < num; i = next) {
            for (next = i + 1; next < num && rows[next] == rows[next - 1] + 1;) next++;
            multiply(m, first, last - first, x.view(i * s.heads + head, s.heads), 0, next - i,
                     to + rows[i] * stride, stride, false);
        }
    });
}

// Tokens [first, last) of those that attend absorbed, up to their rows of latents.
void attend_batch(Worker &w, Call &c, const rq_layer &layer, const rq_cache &cache, int64_t first,
                  int64_t last) {
    const rq_shape &s = c.shape;
    Space &space = c.space;
    Scratch &scratch = space.scratch[w.index()];
    const AbsorbedToken &end = space.absorbed[last - 1];
    w.each(RQ_ATTENTION, end.first_part + end.num_chunks * num_groups(s), [&](int64_t part) {
        int64_t low = first, high = last - 1;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (space.absorbed[middle].first_part <= part)
                low = middle;
            else
                high = middle - 1;
        }
        const AbsorbedToken &token = space.absorbed[low];
        const int64_t at = part - token.first_part;
        attend_chunk(c, scratch, cache, low, at / token.num_chunks, at % token.num_chunks);
    });
    if (last == static_cast<int64_t>(space.absorbed.size())) fetch_heads(w, c, layer.values);
    w.each(RQ_ATTENTION, (last - first) * s.heads, [&](int64_t i) {
        const int64_t row = first * s.heads + i;
        merge_chunks(c, space.absorbed[row / s.heads], row % s.heads, scratch.row);
        space.latent_heads.put(row, scratch.row);
    });
}

}  // namespace

void plan_attention(Call &c, int num_threads) {
    const rq_shape &s = c.shape;
    Space &space = c.space;
    space.absorbed.clear();
    space.absorbed_batches.clear();
    space.expanded.clear();
    space.span_token.clear();
    space.absorbed_of_token.assign(c.step.num_tokens, -1);
    space.absorbed_rows.clear();
    space.absorbed_tokens.clear();
    int64_t first = 0, parts = 0, most_parts = 0, most_queries = 0;
    const int64_t part_bytes = LANES * s.latent_rank * static_cast<int64_t>(sizeof(float));
    for (int64_t i = 0; i < c.step.num_spans; i++) {
        const rq_span &span = c.step.spans[i];
        space.span_token.push_back(first);
        if (!span.is_absorbed) {
            space.expanded.push_back(i);
            most_queries = span.num_tokens > most_queries ? span.num_tokens : most_queries;
        }
        for (int64_t t = 0; span.is_absorbed && t < span.num_tokens; t++) {
            const int64_t visible = span.start + t - span.first + 1;
            int64_t chunk = (visible + MOST_CHUNKS - 1) / MOST_CHUNKS;
            chunk = (chunk + SMALLEST_CHUNK - 1) / SMALLEST_CHUNK * SMALLEST_CHUNK;
            const int64_t chunks = (visible + chunk - 1) / chunk;
            space.absorbed_rows.push_back(static_cast<int64_t>(space.absorbed.size()));
            space.absorbed_tokens.push_back(first + t);
            space.absorbed_of_token[first + t] = static_cast<int64_t>(space.absorbed.size());
            const int64_t more = chunks * num_groups(s);
            if (parts == 0 || (parts + more) * part_bytes > MOST_PART_BYTES) {
                space.absorbed_batches.push_back(static_cast<int64_t>(space.absorbed.size()));
                parts = 0;
            }
            space.absorbed.push_back({first + t, i, visible, chunk, chunks, parts});
            parts += more;
            most_parts = parts > most_parts ? parts : most_parts;
        }
        first += span.num_tokens;
    }
    space.absorbed_batches.push_back(static_cast<int64_t>(space.absorbed.size()));
    space.part_out.reserve(most_parts * LANES * s.latent_rank);
    space.part_most.reserve(most_parts * LANES);
    space.part_total.reserve(most_parts * LANES);
    space.scratch.resize(num_threads);
    const int64_t width = s.latent_rank + s.rope;
    for (Scratch &scratch : space.scratch) {
        scratch.query.reserve(LANES * width);
        scratch.scores.reserve(BLOCK * LANES);
        scratch.weights.reserve(BLOCK * LANES);
        scratch.latent_floats.reserve(BLOCK * width);
        scratch.latents.reserve(BLOCK * width);
        if (most_queries) reserve_expanded(s, scratch, most_queries);
    }
}

void fetch_heads(const Worker &w, const Call &c, const rq_stack &stack) {
    if (c.space.absorbed.empty()) return;
    const int64_t tiles = num_tiles(stack.rows), splits = splits_of_head(w, c, stack);
    const int64_t item = w.first_of(c.shape.heads * splits);
    const int64_t first = tiles * (item % splits) / splits;
    fetch_tiles(matrix_of(stack, item / splits), first, tiles - first);
}

void run_attention(Worker &w, Call &c, const rq_layer &layer, const rq_cache &cache) {
    const rq_shape &s = c.shape;
    Space &space = c.space;
    Scratch &scratch = space.scratch[w.index()];
    const int64_t num = static_cast<int64_t>(space.absorbed.size());
    if (num) {
        run_heads(w, c, layer.keys, space.query_heads, space.query_absorbed, space.absorbed_rows,
                  s.heads * s.latent_rank);
        const std::vector<int64_t> &batches = space.absorbed_batches;
        for (size_t b = 0; b + 1 < batches.size(); b++)
            attend_batch(w, c, layer, cache, batches[b], batches[b + 1]);
        run_heads(w, c, layer.values, space.latent_heads, space.attention, space.absorbed_tokens,
                  s.heads * s.value);
    }
    const int64_t expanded = static_cast<int64_t>(space.expanded.size());
    if (expanded)
        w.each(RQ_ATTENTION, expanded * s.heads, [&](int64_t i) {
            attend_expanded(c, scratch, layer, cache, space.expanded[i / s.heads], i % s.heads);
        });
}

}  // namespace rq
