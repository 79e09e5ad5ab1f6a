// Products of tiles with rows of activations, written once for all instruction sets. Included
// within a namespace of each, after its `Simd`: F are 16 floats, I 16 int32, B 64 bytes.
//
// R rows at a time share what is read of the weights, and all rows what is unpacked of a chunk. A
// row's sums are made of the same operations in the same order, whatever lies beside.

#define RQ_INLINE static inline __attribute__((always_inline))
#define RQ_UNROLL(num) _Pragma(RQ_TEXT(GCC unroll num))
#define RQ_TEXT(x) #x

#include "panel.inl"
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

// All columns of T tiles times at most R rows.
template <class Kind, int T, int R>
static inline void few_tiles(const Tiles &w, int64_t tile, const Panel &x, int64_t width,
                             int64_t num, const Output &to) {
    Simd::F acc[T * R];
    for (int i = 0; i < T * R; i++) acc[i] = Simd::zero();
    const int64_t stride = static_cast<int64_t>(w.tile_bytes);
    Kind::template packed<T, R>(w.packed + tile * stride, stride, width, x, acc);
    for (int t = 0; t < T; t++) write(to, tile + t, 0, num, acc + t * R);
}

template <class Kind, int R>
static void few(const Tiles &w, const Activations &x, int64_t first, int64_t num,
                const Output &to) {
    constexpr int T = R < 4 ? 1 : Kind::TILES;
    Panels<Kind> panels(R, x.width);
    panels.template fill<R>(x, first, num, 0);
    int64_t t = 0;
    for (; t + T <= w.num; t += T)
        few_tiles<Kind, T, R>(w, t, panels.at(0, 0), x.width, num, to);
    for (; t < w.num; t++) few_tiles<Kind, 1, R>(w, t, panels.at(0, 0), x.width, num, to);
}

// A chunk of T tiles times R rows, added to their sums, [row][tile][TILE].
template <class Kind, int T, int R>
static void step(const uint8_t *tile, int64_t stride, const Unpacked *w, int64_t columns,
                 const Panel &x, float *sums) {
    Simd::F acc[T * R];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++)
            acc[t * R + r] = Simd::load_floats(sums + r * Kind::TILES * TILE + t * TILE);
    Kind::template unpacked<T, R>(tile, stride, w, columns, x, acc);
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) Simd::store(sums + r * Kind::TILES * TILE + t * TILE, acc[t * R + r]);
}

// The functions for the least R that holds so many rows.
template <class Kind>
struct Sized {
    using Step = void (*)(const uint8_t *, int64_t, const Unpacked *, int64_t, const Panel &,
                          float *);
    int rows;
    void (*few)(const Tiles &, const Activations &, int64_t, int64_t, const Output &);
    Step step, step_of_one;  // of all tiles, and of one
    void (Panels<Kind>::*fill)(const Activations &, int64_t, int64_t, int64_t);
};

template <class Kind, int R>
static constexpr Sized<Kind> sized() {
    constexpr int ROWS = R < Kind::ROWS ? R : Kind::ROWS;
    return {ROWS, few<Kind, ROWS>, step<Kind, Kind::TILES, ROWS>, step<Kind, 1, ROWS>,
            &Panels<Kind>::template fill<ROWS>};
}

template <class Kind>
static const Sized<Kind> &sized_for(int64_t num) {
    static constexpr Sized<Kind> ALL[] = {sized<Kind, 1>(), sized<Kind, 2>(), sized<Kind, 4>(),
                                          sized<Kind, 6>(), sized<Kind, 8>()};
    return ALL[num > 6 ? 4 : num > 4 ? 3 : num > 2 ? 2 : num - 1];
}

// Choice: so many rows share an unpacked chunk, if their panels leave room in the second cache.
constexpr int64_t MOST_ROWS = 128, MOST_PANEL_BYTES = 512 << 10;

template <class Kind>
static void many(const Tiles &w, const Activations &x, int64_t first, int64_t num,
                 const Output &to) {
    const Sized<Kind> &full = sized_for<Kind>(Kind::ROWS);
    const Sized<Kind> &last = sized_for<Kind>((num - 1) % Kind::ROWS + 1);
    const int64_t num_padded = (num - 1) / Kind::ROWS * Kind::ROWS + last.rows;
    constexpr int64_t SUMS_A_ROW = Kind::TILES * TILE;
    Panels<Kind> panels(num_padded, x.width);
    for (int64_t i = 0; i < num; i += Kind::ROWS) {
        const Sized<Kind> &of = num - i > Kind::ROWS ? full : last;
        (panels.*of.fill)(x, first + i, num - i < of.rows ? num - i : of.rows, i);
    }
    alignas(64) float sums[MOST_ROWS * SUMS_A_ROW];
    Unpacked unpacked[Kind::TILES];
    const int64_t stride = static_cast<int64_t>(w.tile_bytes);
    for (int64_t t = 0, num_tiles; t < w.num; t += num_tiles) {
        num_tiles = t + Kind::TILES <= w.num ? Kind::TILES : 1;
        memset(sums, 0, num_padded * SUMS_A_ROW * sizeof(float));
        const uint8_t *tile = w.packed + t * stride;
        for (int64_t c = 0; c * CHUNK < x.width; c++, tile += Kind::CHUNK_BYTES) {
            const int64_t left = x.width - c * CHUNK, columns = left < CHUNK ? left : CHUNK;
            for (int64_t i = 0; i < num_tiles; i++) Kind::unpack(tile + i * stride, unpacked[i]);
            for (int64_t i = 0; i < num; i += Kind::ROWS) {
                const Sized<Kind> &of = num - i > Kind::ROWS ? full : last;
                (num_tiles == Kind::TILES ? of.step : of.step_of_one)(
                    tile, stride, unpacked, columns, panels.at(c, i), sums + i * SUMS_A_ROW);
            }
        }
        for (int64_t i = 0; i < num; i++)
            for (int64_t j = 0; j < num_tiles; j++) {
                const Simd::F row = Simd::load_floats(sums + i * SUMS_A_ROW + j * TILE);
                write(to, t + j, i, 1, &row);
            }
    }
}

template <class Kind>
static void product(const Tiles &w, const Activations &x, int64_t first, int64_t count,
                    const Output &to) {
    const int64_t fitting = MOST_PANEL_BYTES / (x.width * 4 / Kind::VALUES) / 8 * 8;
    const int64_t most = fitting < 16 ? 16 : fitting < MOST_ROWS ? fitting : MOST_ROWS;
    for (int64_t i = 0; i < count; i += most) {
        const int64_t num = count - i < most ? count - i : most;
        const Output part{to.y + i * to.stride, to.stride, to.width, to.adds};
        if (num <= Kind::ROWS)
            sized_for<Kind>(num).few(w, x, first + i, num, part);
        else
            many<Kind>(w, x, first + i, num, part);
    }
}

// Codes, scales and sums of one row. The largest magnitude of a group becomes 127.
static void quantise_row(const float *x, int64_t width, int8_t *codes, float *scales,
                         int32_t *sums) {
    for (int64_t g = 0; g < width / GROUP; g++, x += GROUP, codes += GROUP) {
        float most = 0;
        for (int i = 0; i < GROUP; i++) {
            const float size = x[i] < 0 ? -x[i] : x[i];
            most = size > most ? size : most;
        }
        const float inverse = most > 0 ? 127.0f / most : 0.0f;
        scales[g] = most / 127.0f;
        for (int half = 0; half < 2; half++) {
            int32_t sum = 0;
            for (int i = 16 * half; i < 16 * half + 16; i++) {
                const float scaled = x[i] * inverse;
                const int32_t code = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
                codes[i] = static_cast<int8_t>(code);
                sum += code;
            }
            sums[2 * g + half] = sum;
        }
    }
}
