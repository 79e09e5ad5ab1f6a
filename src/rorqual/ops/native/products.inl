// Products of tiles with rows of activations, written once for all instruction sets. Included
// within a namespace of each, after its `Simd`: F are 16 floats, I 16 int32, B 64 bytes.
//
// R rows at a time share what is read of the weights, and all rows what is unpacked of a chunk. A
// row's sums are made of the same operations in the same order, whatever lies beside.

#define RQ_INLINE static inline __attribute__((always_inline))
#ifndef RQ_UNROLL
#define RQ_UNROLL(num) _Pragma(RQ_TEXT(GCC unroll num))
#endif
#define RQ_TEXT(x) #x

#include "activations.inl"
#include "kinds.inl"

// Sums of a tile's `num` rows, from row `at` of the output.
static inline void write(const Output &to, int64_t tile, int64_t at, int64_t num,
                         const Simd::F *sums) {
    const int64_t left = to.width - tile * TILE, width = left < TILE ? left : TILE;
    for (int64_t i = 0; i < num; i++) {
        float *y = to.y + (at + i) * to.stride + tile * TILE;
        Simd::store_part(y, to.adds ? Simd::add(Simd::load_part(y, width), sums[i]) : sums[i],
                         width);
    }
}

// All columns of T tiles times R rows.
template <class Kind, int T, int R>
static inline void few_tiles(const Tiles &w, int64_t tile, const Rows &x, int64_t width,
                             const Output &to) {
    Simd::F acc[T * R];
    for (int i = 0; i < T * R; i++) acc[i] = Simd::zero();
    const int64_t stride = static_cast<int64_t>(w.tile_bytes);
    Kind::template packed<T, R>(w.packed + tile * stride, stride, width, x, acc);
    for (int t = 0; t < T; t++) write(to, tile + t, 0, R, acc + t * R);
}

// The same of at most Kind::TILES tiles.
template <class Kind, int R>
static void few(const Tiles &w, int64_t tile, int64_t num_tiles, const Rows &x, int64_t width,
                const Output &to) {
    // Few rows of what needs no unpacking would wait for their own sums: they take two tiles.
    constexpr int T = R < 4 && !Kind::IS_FLOAT ? 1 : Kind::TILES;
    if (num_tiles == T) return few_tiles<Kind, T, R>(w, tile, x, width, to);
    for (int64_t t = tile; t < tile + num_tiles; t++) few_tiles<Kind, 1, R>(w, t, x, width, to);
}

using Few = void (*)(const Tiles &, int64_t, int64_t, const Rows &, int64_t, const Output &);

template <class Kind, int R>
static constexpr Few few_of() {
    return few<Kind, (R < Kind::ROWS ? R : Kind::ROWS)>;
}

// At most Kind::TILES tiles times some rows.
template <class Kind>
static void few_rows(const Tiles &w, int64_t tile, int64_t num_tiles, const Rows &x, int64_t width,
                     int64_t num, const Output &to) {
    static constexpr Few BY_ROWS[] = {few_of<Kind, 1>(), few_of<Kind, 2>(), few_of<Kind, 3>(),
                                      few_of<Kind, 4>(), few_of<Kind, 5>(), few_of<Kind, 6>(),
                                      few_of<Kind, 7>(), few_of<Kind, 8>()};
    for (int64_t i = 0; i < num; i += Kind::ROWS) {
        const int64_t left = num - i, rows = left < Kind::ROWS ? left : Kind::ROWS;
        BY_ROWS[rows - 1](w, tile, num_tiles, x.from_row(i), width,
                          {to.y + i * to.stride, to.stride, to.width, to.adds});
    }
}

// Choice: rows that share an unpacked chunk; fewer than `LEAST_MANY` groups of rows do not pay for
// it, nor kinds that are multiplied as they are stored, while tiles fit the second cache.
constexpr int64_t MOST_ROWS = 128, LEAST_MANY = 3, MOST_STORED_BYTES = 512 << 10;

// A chunk of T tiles times R rows, added to their sums, [row][tile][TILE].
template <class Kind, int T>
static void step(const uint8_t *tile, int64_t stride, const Unpacked *w, int64_t columns,
                 const Rows &x, float *sums) {
    constexpr int R = Kind::ROWS;
    Simd::F acc[T * R];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++)
            acc[t * R + r] = Simd::load_floats(sums + (r * Kind::TILES + t) * TILE);
    Kind::template unpacked<T, R>(tile, stride, w, columns, x, acc);
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++)
            Simd::store(sums + (r * Kind::TILES + t) * TILE, acc[t * R + r]);
}

// At most Kind::TILES tiles times a whole number of Kind::ROWS rows, at most MOST_ROWS.
template <class Kind>
static void many_rows(const Tiles &w, int64_t tile, int64_t num_tiles, const Rows &all_x,
                      int64_t width, int64_t num, const Output &to) {
    alignas(64) float sums[MOST_ROWS * Kind::TILES * TILE];
    Unpacked unpacked[Kind::TILES];
    memset(sums, 0, num * Kind::TILES * TILE * sizeof(float));
    const int64_t stride = static_cast<int64_t>(w.tile_bytes);
    const uint8_t *chunk = w.packed + tile * stride;
    for (int64_t c = 0; c * CHUNK < width; c++, chunk += Kind::CHUNK_BYTES) {
        const int64_t left = width - c * CHUNK, columns = left < CHUNK ? left : CHUNK;
        for (int64_t t = 0; t < num_tiles; t++) Kind::unpack(chunk + t * stride, unpacked[t]);
        for (int64_t i = 0; i < num; i += Kind::ROWS) {
            float *to_sums = sums + i * Kind::TILES * TILE;
            const Rows x = all_x.from_row(i).from_chunk<Kind>(c);
            if (num_tiles == Kind::TILES)
                step<Kind, Kind::TILES>(chunk, stride, unpacked, columns, x, to_sums);
            else
                step<Kind, 1>(chunk, stride, unpacked, columns, x, to_sums);
        }
    }
    for (int64_t i = 0; i < num; i++)
        for (int64_t t = 0; t < num_tiles; t++) {
            const Simd::F row = Simd::load_floats(sums + (i * Kind::TILES + t) * TILE);
            write(to, tile + t, i, 1, &row);
        }
}

template <class Kind>
static void product(const Tiles &w, const Activations &x, int64_t first, int64_t count,
                    const Output &to) {
    constexpr int64_t R = Kind::ROWS;
    const bool is_large = !Kind::IS_STORED || w.tile_bytes * Kind::TILES > MOST_STORED_BYTES;
    for (int64_t i = 0; i < count; i += MOST_ROWS) {
        const int64_t num = count - i < MOST_ROWS ? count - i : MOST_ROWS;
        const int64_t many = is_large && num >= LEAST_MANY * R ? num / R * R : 0;
        const Rows rows = rows_of<Kind>(x, first + i, num);
        const Output of_many{to.y + i * to.stride, to.stride, to.width, to.adds};
        const Output of_rest{to.y + (i + many) * to.stride, to.stride, to.width, to.adds};
        for (int64_t t = 0, at_once; t < w.num; t += at_once) {
            at_once = t + Kind::TILES <= w.num ? Kind::TILES : 1;
            if (many > 0) many_rows<Kind>(w, t, at_once, rows, x.width, many, of_many);
            few_rows<Kind>(w, t, at_once, rows.from_row(many), x.width, num - many, of_rest);
        }
    }
}

// Codes, scales and sums of one row. The largest magnitude of a group becomes 127; codes are
// rounded to the nearest, ties to even. Where a value is not finite, the scale is not either, and so
// are the results; codes of such a group, and of one too small to have an inverse, are zeros.
static void quantise_row(const float *x, int64_t width, int8_t *codes, float *scales,
                         int32_t *sums) {
    for (int64_t g = 0; g < width / GROUP; g++, x += GROUP, codes += GROUP) {
        const Simd::F a = Simd::load_floats(x), b = Simd::load_floats(x + 16);
        const float most = Simd::most(a, b), inverse = 127.0f / most;
        const bool has_codes = inverse > 0 && inverse <= FLT_MAX;
        scales[g] = most / 127.0f;
        sums[2 * g] = Simd::store_codes(codes, has_codes ? Simd::mul(a, inverse) : Simd::zero());
        sums[2 * g + 1] =
            Simd::store_codes(codes + 16, has_codes ? Simd::mul(b, inverse) : Simd::zero());
    }
}
