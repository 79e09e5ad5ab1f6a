// What differs between kinds of weights in a product of T tiles with R rows of x: `packed` reads
// the weights as they are stored, `unpacked` a chunk that `unpack` wrote for many rows. Both do the
// same operations in the same order. Tiles lie `stride` bytes apart; the sum of tile t and
// row r is acc[t * R + r]. Included by products.inl.

// A chunk's weights, unpacked: a byte a code, four inputs of 16 rows side by side.
struct Unpacked {
    alignas(64) uint8_t codes[CHUNK * TILE];
    alignas(64) float by[16 * TILE];  // scales of 32 values, or of 16
    alignas(64) float off[8 * TILE];  // minimums
};

// Kinds that are multiplied as they are stored; a chunk of them stays in the first cache.
template <class Kind>
struct AsStored {
    static constexpr bool IS_STORED = true;
    static void unpack(const uint8_t *, Unpacked &) {}
    template <int T, int R>
    RQ_INLINE void unpacked(const uint8_t *tile, int64_t stride, const Unpacked *, int64_t columns,
                            const Rows &x, Simd::F *acc) {
        Kind::template packed<T, R>(tile, stride, columns, x, acc);
    }
};

struct Bf16 : AsStored<Bf16> {
    static constexpr int ROWS = Simd::FLOAT_ROWS, TILES = Simd::TILES, VALUES = 2;
    static constexpr bool IS_FLOAT = true;
    static constexpr int64_t WORDS = CHUNK / VALUES, SCALES = 0, EXTRAS = 0;
    static constexpr int64_t CHUNK_BYTES = WORDS * BF16_BLOCK;
    static const void *values(const Activations &x) { return x.pairs; }
    static void fill(const float *, const int32_t *, int64_t, int32_t *) {}
    template <int T, int R>
    RQ_INLINE void packed(const uint8_t *tile, int64_t stride, int64_t columns, const Rows &x,
                          Simd::F *acc) {
        RQ_UNROLL(4)
        for (int64_t k = 0; k < columns / VALUES; k++) {
            Simd::Pairs w[T];
            for (int t = 0; t < T; t++) {
                const uint8_t *p = tile + t * stride + k * BF16_BLOCK;
                w[t] = Simd::load_pairs(p);
            }
            for (int r = 0; r < R; r++) {
                const Simd::Word v = Simd::word(x.word(k, r));
                for (int t = 0; t < T; t++)
                    acc[t * R + r] = Simd::dot_pairs(acc[t * R + r], w[t], v);
            }
        }
    }
};

struct F32 : AsStored<F32> {
    static constexpr int ROWS = Simd::FLOAT_ROWS, TILES = Simd::TILES, VALUES = 1;
    static constexpr bool IS_FLOAT = true;
    static constexpr int64_t WORDS = CHUNK, SCALES = 0, EXTRAS = 0;
    static constexpr int64_t CHUNK_BYTES = WORDS * F32_BLOCK;
    static const void *values(const Activations &x) { return x.floats; }
    static void fill(const float *, const int32_t *, int64_t, int32_t *) {}
    template <int T, int R>
    RQ_INLINE void packed(const uint8_t *tile, int64_t stride, int64_t columns, const Rows &x,
                          Simd::F *acc) {
        RQ_UNROLL(4)
        for (int64_t k = 0; k < columns; k++) {
            Simd::F w[T];
            for (int t = 0; t < T; t++) {
                const uint8_t *p = tile + t * stride + k * F32_BLOCK;
                w[t] = Simd::floats(p);
            }
            for (int r = 0; r < R; r++) {
                const Simd::F v = Simd::all_of(x.word(k, r));
                for (int t = 0; t < T; t++) acc[t * R + r] = Simd::fma(w[t], v, acc[t * R + r]);
            }
        }
    }
};

struct Q8_0 : AsStored<Q8_0> {
    static constexpr int ROWS = Simd::CODE_ROWS, TILES = Simd::TILES, VALUES = STEP;
    static constexpr bool IS_FLOAT = false;
    static constexpr int64_t WORDS = CHUNK / VALUES, SCALES = 8, EXTRAS = 8;
    static constexpr int64_t CHUNK_BYTES = 8 * Q8_0_BLOCK;
    static const void *values(const Activations &x) { return x.codes; }
    // Weights are unsigned where sums begin with what that adds, taken off.
    static void fill(const float *, const int32_t *sums, int64_t groups, int32_t *extras) {
        for (int64_t g = 0; g < groups; g++)
            extras[g] = Simd::SIGNED_EXCESS * (sums[2 * g] + sums[2 * g + 1]);
    }
    template <int T, int R>
    RQ_INLINE void packed(const uint8_t *tile, int64_t stride, int64_t columns, const Rows &x,
                          Simd::F *acc) {
        for (int64_t g = 0; g < columns / GROUP; g++, tile += Q8_0_BLOCK) {
            Simd::I sum[T * R];
            for (int r = 0; r < R; r++)
                for (int t = 0; t < T; t++) sum[t * R + r] = Simd::ints(x.extra(g, r));
            RQ_UNROLL(8)
            for (int k = 0; k < GROUP / STEP; k++) {
                Simd::Signed w[T];
                for (int t = 0; t < T; t++) {
                    const uint8_t *p = tile + t * stride + 2 * TILE + k * 64;
                    w[t] = Simd::as_signed(Simd::load(p));
                }
                for (int r = 0; r < R; r++) {
                    const Simd::Word v = Simd::word(x.word(g * 8 + k, r));
                    for (int t = 0; t < T; t++)
                        sum[t * R + r] = Simd::dot_signed(sum[t * R + r], w[t], v);
                }
            }
            for (int t = 0; t < T; t++) {
                const Simd::F by = Simd::halves(tile + t * stride);
                for (int r = 0; r < R; r++)
                    acc[t * R + r] = Simd::fma(Simd::mul(Simd::to_float(sum[t * R + r]), by),
                                               Simd::all_of(x.scale(g, r)), acc[t * R + r]);
            }
        }
    }
};

struct Q4_K {
    static constexpr bool IS_STORED = false;
    static constexpr int ROWS = Simd::NIBBLE_ROWS, TILES = 1, VALUES = STEP;
    static constexpr bool IS_FLOAT = false;
    static constexpr int64_t WORDS = CHUNK / VALUES, SCALES = 8, EXTRAS = 8;
    static constexpr int64_t CHUNK_BYTES = Q4_K_BLOCK;
    static const void *values(const Activations &x) { return x.codes; }
    // What a sub-block's minimum is multiplied with.
    static void fill(const float *scales, const int32_t *sums, int64_t groups, int32_t *extras) {
        for (int64_t g = 0; g < groups; g++) {
            const float by = -scales[g] * static_cast<float>(sums[2 * g] + sums[2 * g + 1]);
            memcpy(extras + g, &by, 4);
        }
    }
    // A block's scales and minimums, of 16 rows each: two times four sub-blocks.
    struct Scales {
        Simd::F d, dmin, d_high;
        Simd::B by[2], off[2];
        // Of sub-block J, for codes that are `part` of what is stored.
        template <int J>
        Simd::F scale(Simd::F part) const {
            return Simd::mul(part, Simd::bytes_of<J % 4>(by[J / 4]));
        }
        template <int J>
        Simd::F minimum() const {
            return Simd::mul(dmin, Simd::bytes_of<J % 4>(off[J / 4]));
        }
    };
    RQ_INLINE Scales scales(const uint8_t *tile) {
        const Simd::B s = Simd::load(tile + 64), m = Simd::load(tile + 128);
        const Simd::B rest = Simd::load(tile + 192);
        const Simd::F d = Simd::halves(tile);
        return {d, Simd::halves(tile + 2 * TILE), Simd::mul(d, Simd::HIGH),
                {Simd::low_six(s), Simd::top_two(Simd::low_nibbles(rest), s)},
                {Simd::low_six(m), Simd::top_two(Simd::high_nibbles(rest), m)}};
    }
    template <int R>
    RQ_INLINE void finish(const Simd::Short *sum, int j, Simd::F by, Simd::F off, const Rows &x,
                          Simd::F *acc) {
        for (int r = 0; r < R; r++) {
            const Simd::F dot = Simd::to_float(Simd::widened(sum[r]));
            acc[r] = Simd::fma(Simd::mul(dot, by), Simd::all_of(x.scale(j, r)), acc[r]);
            acc[r] = Simd::fma(off, Simd::all_of(x.extra(j, r)), acc[r]);
        }
    }
    // Sub-blocks J and J + 1: the low nibbles of the same bytes, and the high ones.
    template <int R, int J>
    RQ_INLINE void two_sub_blocks(const uint8_t *tile, const Scales &s, const Rows &x,
                                  Simd::F *acc) {
        const uint8_t *codes = tile + 16 * TILE + J / 2 * 8 * 64;
        Simd::Short low[R], high[R];
        for (int r = 0; r < R; r++) low[r] = high[r] = Simd::zero_short();
        RQ_UNROLL(8)
        for (int k = 0; k < 8; k++) {
            const Simd::B w = Simd::load(codes + k * 64);
            const Simd::B l = Simd::low_nibbles(w), h = Simd::high_part(w);
            for (int r = 0; r < R; r++) {
                low[r] = Simd::dot_short(low[r], l, Simd::word(x.word(J * 8 + k, r)));
                high[r] = Simd::dot_short(high[r], h, Simd::word(x.word(J * 8 + 8 + k, r)));
            }
        }
        finish<R>(low, J, s.scale<J>(s.d), s.minimum<J>(), x, acc);
        finish<R>(high, J + 1, s.scale<J + 1>(s.d_high), s.minimum<J + 1>(), x, acc);
    }
    template <int T, int R>
    RQ_INLINE void packed(const uint8_t *tile, int64_t, int64_t columns, const Rows &all_x,
                          Simd::F *acc) {
        static_assert(T == 1, "sums of more tiles do not fit");
        for (int64_t b = 0; b < columns / SUPER; b++, tile += Q4_K_BLOCK) {
            const Rows x = all_x.from_chunk<Q4_K>(b);
            const Scales s = scales(tile);
            two_sub_blocks<R, 0>(tile, s, x, acc);
            two_sub_blocks<R, 2>(tile, s, x, acc);
            two_sub_blocks<R, 4>(tile, s, x, acc);
            two_sub_blocks<R, 6>(tile, s, x, acc);
        }
    }
    template <int HALF>
    RQ_INLINE void unpack_scales(const Scales &s, Unpacked &to) {
        float *by = to.by + 4 * HALF * TILE, *off = to.off + 4 * HALF * TILE;
        Simd::store(by, s.scale<4 * HALF>(s.d));
        Simd::store(by + TILE, s.scale<4 * HALF + 1>(s.d));
        Simd::store(by + 2 * TILE, s.scale<4 * HALF + 2>(s.d));
        Simd::store(by + 3 * TILE, s.scale<4 * HALF + 3>(s.d));
        Simd::store(off, s.minimum<4 * HALF>());
        Simd::store(off + TILE, s.minimum<4 * HALF + 1>());
        Simd::store(off + 2 * TILE, s.minimum<4 * HALF + 2>());
        Simd::store(off + 3 * TILE, s.minimum<4 * HALF + 3>());
    }
    static void unpack(const uint8_t *tile, Unpacked &to) {
        const Scales s = scales(tile);
        unpack_scales<0>(s, to);
        unpack_scales<1>(s, to);
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 8; k++) {
                const Simd::B w = Simd::load(tile + 16 * TILE + (i * 8 + k) * 64);
                Simd::store_bytes(to.codes + (i * 16 + k) * 64, Simd::low_nibbles(w));
                Simd::store_bytes(to.codes + (i * 16 + 8 + k) * 64, Simd::high_nibbles(w));
            }
    }
    template <int T, int R>
    RQ_INLINE void unpacked(const uint8_t *, int64_t, const Unpacked *w, int64_t, const Rows &x,
                            Simd::F *acc) {
        for (int j = 0; j < 8; j++) {
            Simd::Short sum[T * R];
            for (int i = 0; i < T * R; i++) sum[i] = Simd::zero_short();
            RQ_UNROLL(8)
            for (int k = j * 8; k < j * 8 + 8; k++) {
                Simd::B codes[T];
                for (int t = 0; t < T; t++) codes[t] = Simd::load(w[t].codes + k * 64);
                for (int r = 0; r < R; r++) {
                    const Simd::Word v = Simd::word(x.word(k, r));
                    for (int t = 0; t < T; t++)
                        sum[t * R + r] = Simd::dot_short(sum[t * R + r], codes[t], v);
                }
            }
            for (int t = 0; t < T; t++)
                finish<R>(sum + t * R, j, Simd::load_floats(w[t].by + j * TILE),
                          Simd::load_floats(w[t].off + j * TILE), x, acc + t * R);
        }
    }
};

struct Q6_K {
    static constexpr bool IS_STORED = false;
    static constexpr int ROWS = Simd::CODE_ROWS, TILES = 1, VALUES = STEP;
    static constexpr bool IS_FLOAT = false;
    static constexpr int64_t WORDS = CHUNK / VALUES, SCALES = 8, EXTRAS = 16;
    static constexpr int64_t CHUNK_BYTES = Q6_K_BLOCK;
    static const void *values(const Activations &x) { return x.codes; }
    // Codes have 32 added, which sums begin with taken off.
    static void fill(const float *, const int32_t *sums, int64_t groups, int32_t *extras) {
        for (int64_t i = 0; i < 2 * groups; i++) extras[i] = -32 * sums[i];
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
    RQ_INLINE Simd::F scale(const uint8_t *tile, int s) {
        return Simd::mul(Simd::halves(tile), Simd::signed_bytes(tile + 2 * TILE + s * TILE));
    }
    // Sub-block s, the first or second half of a group: part[i] goes from one to the other.
    template <int T, int R>
    RQ_INLINE void half(int s, const Simd::B (*w)[4], const Simd::F *by, const Rows &x,
                        Simd::F *part, Simd::F *acc) {
        Simd::I sum[T * R];
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) sum[t * R + r] = Simd::ints(x.extra(s, r));
        for (int k = 0; k < 4; k += 2)
            for (int r = 0; r < R; r++) {
                const Simd::Word v0 = Simd::word(x.word(s * 4 + k, r));
                const Simd::Word v1 = Simd::word(x.word(s * 4 + k + 1, r));
                for (int t = 0; t < T; t++)
                    sum[t * R + r] = Simd::dot_two(sum[t * R + r], w[t][k], w[t][k + 1], v0, v1);
            }
        for (int t = 0; t < T; t++)
            for (int i = t * R; i < t * R + R; i++) {
                const Simd::F dot = Simd::to_float(sum[i]);
                part[i] = s % 2 ? Simd::fma(dot, by[t], part[i]) : Simd::mul(dot, by[t]);
                if (s % 2)
                    acc[i] = Simd::fma(part[i], Simd::all_of(x.scale(s / 2, i - t * R)),
                                       acc[i]);
            }
    }
    template <int T, int R>
    RQ_INLINE void packed(const uint8_t *tile, int64_t stride, int64_t columns, const Rows &all_x,
                          Simd::F *acc) {
        for (int64_t b = 0; b < columns / SUPER; b++, tile += Q6_K_BLOCK) {
            const Rows x = all_x.from_chunk<Q6_K>(b);
            Simd::F part[T * R] = {};
            for (int s = 0; s < 16; s++) {
                Simd::B w[T][4];
                Simd::F by[T];
                for (int t = 0; t < T; t++) {
                    const uint8_t *codes = tile + t * stride + 18 * TILE + s * 192;
                    codes_of(codes, w[t]);
                    by[t] = scale(tile + t * stride, s);
                }
                half<T, R>(s, w, by, x, part, acc);
            }
        }
    }
    static void unpack(const uint8_t *tile, Unpacked &to) {
        for (int s = 0; s < 16; s++) {
            Simd::B w[4];
            codes_of(tile + 18 * TILE + s * 192, w);
            for (int k = 0; k < 4; k++) Simd::store_bytes(to.codes + (s * 4 + k) * 64, w[k]);
            Simd::store(to.by + s * TILE, scale(tile, s));
        }
    }
    template <int T, int R>
    RQ_INLINE void unpacked(const uint8_t *, int64_t, const Unpacked *of_w, int64_t, const Rows &x,
                            Simd::F *acc) {
        Simd::F part[T * R] = {};
        for (int s = 0; s < 16; s++) {
            Simd::B w[T][4];
            Simd::F by[T];
            for (int t = 0; t < T; t++) {
                for (int k = 0; k < 4; k++) w[t][k] = Simd::load(of_w[t].codes + (s * 4 + k) * 64);
                by[t] = Simd::load_floats(of_w[t].by + s * TILE);
            }
            half<T, R>(s, w, by, x, part, acc);
        }
    }
};
