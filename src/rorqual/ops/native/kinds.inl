// What differs between kinds of weights in a product of a tile with R rows of a panel: `packed`
// reads the weights as they are stored, `unpacked` a chunk that `unpack` wrote for many rows. Both
// do the same operations in the same order. Included by products.inl.

// Prefetched so far ahead of the weights that are read: what comes in during a memory access.
constexpr int64_t AHEAD = 4096;

RQ_INLINE Simd::B load_ahead(const uint8_t *p) {
    __builtin_prefetch(p + AHEAD);
    return Simd::load(p);
}

// A chunk's weights, unpacked: a byte a code, four inputs of 16 rows side by side.
struct Unpacked {
    alignas(64) uint8_t codes[CHUNK * TILE];
    alignas(64) float by[16 * TILE];   // scales of 32 values, or of 16
    alignas(64) float off[8 * TILE];   // minimums
};

struct Bf16 {
    static constexpr int ROWS = Simd::FLOAT_ROWS, VALUES = 2;
    static constexpr int64_t WORDS = CHUNK / VALUES, SCALES = 0, SUMS = 0, OFFSETS = 0;
    static constexpr int64_t CHUNK_BYTES = WORDS * BF16_BLOCK;
    static const uint8_t *bytes(const Activations &x) {
        return reinterpret_cast<const uint8_t *>(x.pairs);
    }
    template <int R>
    static void fill(const Activations &, int64_t, int64_t, int64_t, int64_t, float *, int32_t *,
                     float *) {}
    template <int R>
    RQ_INLINE void packed(const uint8_t *tile, int64_t columns, const Panel &x, Simd::F *acc) {
        for (int64_t k = 0; k < columns / VALUES; k++) {
            __builtin_prefetch(tile + k * BF16_BLOCK + AHEAD);
            const Simd::Pairs w = Simd::load_pairs(tile + k * BF16_BLOCK);
            for (int r = 0; r < R; r++) acc[r] = Simd::dot_pairs(acc[r], w, x.words + k * R + r);
        }
    }
    static void unpack(const uint8_t *, int64_t, Unpacked &) {}
    template <int R>
    RQ_INLINE void unpacked(const uint8_t *tile, const Unpacked &, int64_t columns, const Panel &x,
                            Simd::F *acc) {
        packed<R>(tile, columns, x, acc);
    }
};

struct F32 {
    static constexpr int ROWS = Simd::FLOAT_ROWS, VALUES = 1;
    static constexpr int64_t WORDS = CHUNK, SCALES = 0, SUMS = 0, OFFSETS = 0;
    static constexpr int64_t CHUNK_BYTES = WORDS * F32_BLOCK;
    static const uint8_t *bytes(const Activations &x) {
        return reinterpret_cast<const uint8_t *>(x.floats);
    }
    template <int R>
    static void fill(const Activations &, int64_t, int64_t, int64_t, int64_t, float *, int32_t *,
                     float *) {}
    template <int R>
    RQ_INLINE void packed(const uint8_t *tile, int64_t columns, const Panel &x, Simd::F *acc) {
        for (int64_t k = 0; k < columns; k++) {
            __builtin_prefetch(tile + k * F32_BLOCK + AHEAD);
            const Simd::F w = Simd::floats(tile + k * F32_BLOCK);
            for (int r = 0; r < R; r++) acc[r] = Simd::fma(w, Simd::all_of(x.words + k * R + r), acc[r]);
        }
    }
    static void unpack(const uint8_t *, int64_t, Unpacked &) {}
    template <int R>
    RQ_INLINE void unpacked(const uint8_t *tile, const Unpacked &, int64_t columns, const Panel &x,
                            Simd::F *acc) {
        packed<R>(tile, columns, x, acc);
    }
};

struct Q8_0 {
    static constexpr int ROWS = Simd::CODE_ROWS, VALUES = STEP;
    static constexpr int64_t WORDS = CHUNK / VALUES, SCALES = 8, SUMS = 8, OFFSETS = 0;
    static constexpr int64_t CHUNK_BYTES = 8 * Q8_0_BLOCK;
    static const uint8_t *bytes(const Activations &x) {
        return reinterpret_cast<const uint8_t *>(x.codes);
    }
    template <int R>
    static void fill(const Activations &x, int64_t row, int64_t num, int64_t column,
                     int64_t columns, float *scales, int32_t *sums, float *) {
        fill_groups<R, 1>(x, row, num, column, columns, Simd::SIGNED_EXCESS, scales, sums, nullptr);
    }
    template <int R>
    RQ_INLINE void packed(const uint8_t *tile, int64_t columns, const Panel &x, Simd::F *acc) {
        for (int64_t g = 0; g < columns / GROUP; g++, tile += Q8_0_BLOCK) {
            Simd::I sum[R];
            for (int r = 0; r < R; r++) sum[r] = Simd::all_int(x.sums + g * R + r);
            for (int k = 0; k < GROUP / STEP; k++) {
                const Simd::Signed w = Simd::as_signed(load_ahead(tile + 2 * TILE + k * 64));
                for (int r = 0; r < R; r++)
                    sum[r] = Simd::dot_signed(sum[r], w, x.words + (g * 8 + k) * R + r);
            }
            const Simd::F by = Simd::halves(tile);
            for (int r = 0; r < R; r++)
                acc[r] = Simd::fma(Simd::mul(Simd::to_float(sum[r]), by),
                                   Simd::all_of(x.scales + g * R + r), acc[r]);
        }
    }
    static void unpack(const uint8_t *, int64_t, Unpacked &) {}
    template <int R>
    RQ_INLINE void unpacked(const uint8_t *tile, const Unpacked &, int64_t columns, const Panel &x,
                            Simd::F *acc) {
        packed<R>(tile, columns, x, acc);
    }
};

struct Q4_K {
    static constexpr int ROWS = Simd::CODE_ROWS, VALUES = STEP;
    static constexpr int64_t WORDS = CHUNK / VALUES, SCALES = 8, SUMS = 0, OFFSETS = 8;
    static constexpr int64_t CHUNK_BYTES = Q4_K_BLOCK;
    static const uint8_t *bytes(const Activations &x) {
        return reinterpret_cast<const uint8_t *>(x.codes);
    }
    template <int R>
    static void fill(const Activations &x, int64_t row, int64_t num, int64_t column,
                     int64_t columns, float *scales, int32_t *, float *offsets) {
        fill_groups<R, 0>(x, row, num, column, columns, 0, scales, nullptr, offsets);
    }
    // Scale and minimum of sub-block j.
    RQ_INLINE void scales(const uint8_t *tile, int j, Simd::F d, Simd::F dmin, Simd::F &by,
                          Simd::F &off) {
        const uint8_t *s = tile + 4 * TILE + j * TILE, *m = s + 4 * TILE;
        if (j < 4) {
            by = Simd::mul(d, Simd::bytes<0, 63, 0>(s, s));
            off = Simd::mul(dmin, Simd::bytes<0, 63, 0>(m, m));
        } else {
            by = Simd::mul(d, Simd::bytes<0, 15, 2>(m, s - 4 * TILE));
            off = Simd::mul(dmin, Simd::bytes<4, 15, 2>(m, s));
        }
    }
    template <int R>
    RQ_INLINE void finish(const Simd::Short *sum, int j, Simd::F by, Simd::F off, const Panel &x,
                          Simd::F *acc) {
        for (int r = 0; r < R; r++) {
            const Simd::F dot = Simd::to_float(Simd::widened(sum[r]));
            acc[r] = Simd::fma(Simd::mul(dot, by), Simd::all_of(x.scales + j * R + r), acc[r]);
            acc[r] = Simd::fma(off, Simd::all_of(x.offsets + j * R + r), acc[r]);
        }
    }
    template <int R>
    RQ_INLINE void packed(const uint8_t *tile, int64_t columns, const Panel &of_x, Simd::F *acc) {
        Panel x = of_x;
        for (int64_t b = 0; b < columns / SUPER; b++, tile += Q4_K_BLOCK) {
            const Simd::F d = Simd::halves(tile), dmin = Simd::halves(tile + 2 * TILE);
            for (int i = 0; i < 4; i++) __builtin_prefetch(tile + 64 * i + AHEAD);
            const uint8_t *codes = tile + 16 * TILE;
            for (int j = 0; j < 8; j++) {
                Simd::Short sum[R];
                for (int r = 0; r < R; r++) sum[r] = Simd::zero_short();
                for (int k = 0; k < 8; k++) {
                    const uint8_t *p = codes + (j / 2 * 8 + k) * 64;
                    const Simd::B both = j % 2 ? Simd::load(p) : load_ahead(p);
                    const Simd::B w = j % 2 ? Simd::high_nibbles(both) : Simd::low_nibbles(both);
                    for (int r = 0; r < R; r++)
                        sum[r] = Simd::dot_short(sum[r], w, x.words + (j * 8 + k) * R + r);
                }
                Simd::F by, off;
                scales(tile, j, d, dmin, by, off);
                finish<R>(sum, j, by, off, x, acc);
            }
            x = {x.words + WORDS * R, x.scales + SCALES * R, nullptr, x.offsets + OFFSETS * R};
        }
    }
    static void unpack(const uint8_t *tile, int64_t, Unpacked &to) {
        const Simd::F d = Simd::halves(tile), dmin = Simd::halves(tile + 2 * TILE);
        const uint8_t *codes = tile + 16 * TILE;
        for (int j = 0; j < 8; j++) {
            Simd::F by, off;
            scales(tile, j, d, dmin, by, off);
            Simd::store(to.by + j * TILE, by);
            Simd::store(to.off + j * TILE, off);
        }
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 8; k++) {
                const Simd::B w = load_ahead(codes + (i * 8 + k) * 64);
                Simd::store_bytes(to.codes + (i * 16 + k) * 64, Simd::low_nibbles(w));
                Simd::store_bytes(to.codes + (i * 16 + 8 + k) * 64, Simd::high_nibbles(w));
            }
    }
    template <int R>
    RQ_INLINE void unpacked(const uint8_t *, const Unpacked &w, int64_t, const Panel &x,
                            Simd::F *acc) {
        for (int j = 0; j < 8; j++) {
            Simd::Short sum[R];
            for (int r = 0; r < R; r++) sum[r] = Simd::zero_short();
            for (int k = j * 8; k < j * 8 + 8; k++) {
                const Simd::B codes = Simd::load(w.codes + k * 64);
                for (int r = 0; r < R; r++)
                    sum[r] = Simd::dot_short(sum[r], codes, x.words + k * R + r);
            }
            finish<R>(sum, j, Simd::load_floats(w.by + j * TILE),
                      Simd::load_floats(w.off + j * TILE), x, acc);
        }
    }
};

struct Q6_K {
    static constexpr int ROWS = Simd::CODE_ROWS, VALUES = STEP;
    static constexpr int64_t WORDS = CHUNK / VALUES, SCALES = 8, SUMS = 16, OFFSETS = 0;
    static constexpr int64_t CHUNK_BYTES = Q6_K_BLOCK;
    static const uint8_t *bytes(const Activations &x) {
        return reinterpret_cast<const uint8_t *>(x.codes);
    }
    template <int R>
    static void fill(const Activations &x, int64_t row, int64_t num, int64_t column,
                     int64_t columns, float *scales, int32_t *sums, float *) {
        fill_groups<R, 2>(x, row, num, column, columns, -32, scales, sums, nullptr);
    }
    // Four steps of codes with 32 added to each.
    RQ_INLINE void codes_of(const uint8_t *codes, Simd::B *w) {
        const Simd::B a = Simd::load(codes), c = Simd::load(codes + 64);
        const Simd::B high = Simd::load(codes + 128);
        w[0] = Simd::six_bits<0>(Simd::low_nibbles(a), high);
        w[1] = Simd::six_bits<1>(Simd::high_nibbles(a), high);
        w[2] = Simd::six_bits<2>(Simd::low_nibbles(c), high);
        w[3] = Simd::six_bits<3>(Simd::high_nibbles(c), high);
    }
    // Sub-block s, the first or second half of a group; part[r] goes from one to the other.
    template <int R>
    RQ_INLINE void half(int s, const Simd::B *w, Simd::F by, const Panel &x, Simd::F *part,
                        Simd::F *acc) {
        for (int r = 0; r < R; r++) {
            Simd::I sum = Simd::all_int(x.sums + s * R + r);
            const int32_t *words = x.words + s * 4 * R + r;
            sum = Simd::dot_two(sum, w[0], w[1], words, words + R);
            sum = Simd::dot_two(sum, w[2], w[3], words + 2 * R, words + 3 * R);
            if (s % 2 == 0) {
                part[r] = Simd::mul(Simd::to_float(sum), by);
            } else {
                part[r] = Simd::fma(Simd::to_float(sum), by, part[r]);
                acc[r] = Simd::fma(part[r], Simd::all_of(x.scales + s / 2 * R + r), acc[r]);
            }
        }
    }
    template <int R>
    RQ_INLINE void packed(const uint8_t *tile, int64_t columns, const Panel &of_x, Simd::F *acc) {
        Panel x = of_x;
        for (int64_t b = 0; b < columns / SUPER; b++, tile += Q6_K_BLOCK) {
            const Simd::F d = Simd::halves(tile);
            const uint8_t *scales = tile + 2 * TILE, *codes = scales + 16 * TILE;
            for (int i = 0; i < 5; i++) __builtin_prefetch(tile + 64 * i + AHEAD);
            Simd::F part[R] = {};
            for (int s = 0; s < 16; s++, codes += 192) {
                for (int i = 0; i < 3; i++) __builtin_prefetch(codes + 64 * i + AHEAD);
                Simd::B w[4];
                codes_of(codes, w);
                half<R>(s, w, Simd::mul(d, Simd::signed_bytes(scales + s * TILE)), x, part, acc);
            }
            x = {x.words + WORDS * R, x.scales + SCALES * R, x.sums + SUMS * R, nullptr};
        }
    }
    static void unpack(const uint8_t *tile, int64_t, Unpacked &to) {
        const Simd::F d = Simd::halves(tile);
        const uint8_t *scales = tile + 2 * TILE, *codes = scales + 16 * TILE;
        for (int s = 0; s < 16; s++, codes += 192) {
            for (int i = 0; i < 3; i++) __builtin_prefetch(codes + 64 * i + AHEAD);
            Simd::B w[4];
            codes_of(codes, w);
            for (int k = 0; k < 4; k++) Simd::store_bytes(to.codes + (s * 4 + k) * 64, w[k]);
            Simd::store(to.by + s * TILE, Simd::mul(d, Simd::signed_bytes(scales + s * TILE)));
        }
    }
    template <int R>
    RQ_INLINE void unpacked(const uint8_t *, const Unpacked &of_w, int64_t, const Panel &x,
                            Simd::F *acc) {
        Simd::F part[R] = {};
        for (int s = 0; s < 16; s++) {
            Simd::B w[4];
            for (int k = 0; k < 4; k++) w[k] = Simd::load(of_w.codes + (s * 4 + k) * 64);
            half<R>(s, w, Simd::load_floats(of_w.by + s * TILE), x, part, acc);
        }
    }
};
