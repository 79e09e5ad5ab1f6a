// Products of a tile with rows of activations, written once for all instruction sets. Included
// within a namespace of each, after its `Simd`: F are 16 floats, I 16 int32, B 64 bytes.
//
// R rows at a time share what is read and unpacked of the weights.

template <int R>
static inline void bf16_rows(const uint8_t *tile, const Activations &x, int64_t first, float *y) {
    Simd::F acc[R];
    for (int r = 0; r < R; r++) acc[r] = Simd::zero();
    const int64_t num_pairs = x.width / 2;
    for (int64_t k = 0; k < num_pairs; k++) {
        const Simd::Pairs w = Simd::load_pairs(tile + k * BF16_BLOCK);
        for (int r = 0; r < R; r++)
            acc[r] = Simd::dot_pairs(acc[r], w, x.pairs + (first + r) * x.stride + 2 * k);
    }
    for (int r = 0; r < R; r++) Simd::store(y + r * TILE, acc[r]);
}

template <int R>
static inline void f32_rows(const uint8_t *tile, const Activations &x, int64_t first, float *y) {
    Simd::F acc[R];
    for (int r = 0; r < R; r++) acc[r] = Simd::zero();
    for (int64_t k = 0; k < x.width; k++) {
        const Simd::F w = Simd::floats(tile + k * F32_BLOCK);
        for (int r = 0; r < R; r++)
            acc[r] = Simd::fma(w, Simd::all(x.floats[(first + r) * x.stride + k]), acc[r]);
    }
    for (int r = 0; r < R; r++) Simd::store(y + r * TILE, acc[r]);
}

template <int R>
static inline void q8_0_rows(const uint8_t *tile, const Activations &x, int64_t first, float *y) {
    Simd::F acc[R];
    for (int r = 0; r < R; r++) acc[r] = Simd::zero();
    const int64_t num_blocks = x.width / GROUP;
    for (int64_t b = 0; b < num_blocks; b++, tile += Q8_0_BLOCK) {
        Simd::I sum[R];
        for (int r = 0; r < R; r++) sum[r] = Simd::zero_int();
        for (int k = 0; k < GROUP / STEP; k++) {
            const Simd::Signed w = Simd::as_signed(Simd::load(tile + 2 * TILE + k * 64));
            for (int r = 0; r < R; r++)
                sum[r] = Simd::dot_signed(
                    sum[r], w, x.codes + (first + r) * x.stride + b * GROUP + k * STEP);
        }
        const Simd::F scale = Simd::halves(tile);
        for (int r = 0; r < R; r++) {
            const int64_t row = first + r;
            const int32_t *sums = x.sums + row * (x.stride / 16) + 2 * b;
            const Simd::I exact = Simd::add(sum[r], Simd::SIGNED_EXCESS * (sums[0] + sums[1]));
            const Simd::F by = Simd::mul(scale, x.scales[row * (x.stride / GROUP) + b]);
            acc[r] = Simd::fma(Simd::to_float(exact), by, acc[r]);
        }
    }
    for (int r = 0; r < R; r++) Simd::store(y + r * TILE, acc[r]);
}

// The 6-bit scales and minimums of sub-block j, of 16 rows: 12 vectors of a byte a row.
static inline void q4_k_scales(const uint8_t *packed, int j, uint8_t *scale, uint8_t *low) {
    const uint8_t *s = packed + j * TILE, *m = packed + (j + 4) * TILE;
    if (j < 4) {
        for (int i = 0; i < TILE; i++) {
            scale[i] = s[i] & 63;
            low[i] = m[i] & 63;
        }
    } else {
        const uint8_t *high_s = packed + (j - 4) * TILE, *high_m = packed + j * TILE;
        for (int i = 0; i < TILE; i++) {
            scale[i] = (m[i] & 15) | ((high_s[i] >> 6) << 4);
            low[i] = (m[i] >> 4) | ((high_m[i] >> 6) << 4);
        }
    }
}

template <int R>
static inline void q4_k_rows(const uint8_t *tile, const Activations &x, int64_t first, float *y) {
    Simd::F acc[R];
    for (int r = 0; r < R; r++) acc[r] = Simd::zero();
    const int64_t num_blocks = x.width / SUPER, num_groups = x.stride / GROUP;
    for (int64_t b = 0; b < num_blocks; b++, tile += Q4_K_BLOCK) {
        const Simd::F d = Simd::halves(tile), dmin = Simd::halves(tile + 2 * TILE);
        const uint8_t *scales = tile + 4 * TILE, *codes = scales + 12 * TILE;
        for (int pair = 0; pair < 4; pair++) {
            Simd::I even[R], odd[R];
            for (int r = 0; r < R; r++) even[r] = odd[r] = Simd::zero_int();
            for (int k = 0; k < GROUP / STEP; k++) {
                const Simd::B w = Simd::load(codes + (pair * 8 + k) * 64);
                const Simd::B low = Simd::low_nibbles(w), high = Simd::high_nibbles(w);
                for (int r = 0; r < R; r++) {
                    const int8_t *a =
                        x.codes + (first + r) * x.stride + b * SUPER + pair * 64 + k * STEP;
                    even[r] = Simd::dot(even[r], low, a);
                    odd[r] = Simd::dot(odd[r], high, a + GROUP);
                }
            }
            for (int half = 0; half < 2; half++) {
                uint8_t scale[TILE], low[TILE];
                q4_k_scales(scales, 2 * pair + half, scale, low);
                const Simd::F by = Simd::mul(d, Simd::bytes(scale));
                const Simd::F off = Simd::mul(dmin, Simd::bytes(low));
                const int64_t group = b * 8 + 2 * pair + half;
                for (int r = 0; r < R; r++) {
                    const int64_t row = first + r;
                    const float of_x = x.scales[row * num_groups + group];
                    const int32_t *sums = x.sums + 2 * (row * num_groups + group);
                    const Simd::F dot = Simd::to_float(half ? odd[r] : even[r]);
                    acc[r] = Simd::fma(dot, Simd::mul(by, of_x), acc[r]);
                    acc[r] = Simd::fma(
                        off, Simd::all(-of_x * static_cast<float>(sums[0] + sums[1])), acc[r]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++) Simd::store(y + r * TILE, acc[r]);
}

// Four steps of codes with 32 added to each.
static inline void q6_k_codes(const uint8_t *codes, Simd::B *w) {
    const Simd::B a = Simd::load(codes), c = Simd::load(codes + 64);
    const Simd::B high = Simd::load(codes + 128);
    w[0] = Simd::six_bits<0>(Simd::low_nibbles(a), high);
    w[1] = Simd::six_bits<1>(Simd::high_nibbles(a), high);
    w[2] = Simd::six_bits<2>(Simd::low_nibbles(c), high);
    w[3] = Simd::six_bits<3>(Simd::high_nibbles(c), high);
}

template <int R>
static inline void q6_k_rows(const uint8_t *tile, const Activations &x, int64_t first, float *y) {
    Simd::F acc[R];
    for (int r = 0; r < R; r++) acc[r] = Simd::zero();
    const int64_t num_blocks = x.width / SUPER;
    for (int64_t b = 0; b < num_blocks; b++, tile += Q6_K_BLOCK) {
        const Simd::F d = Simd::halves(tile);
        const uint8_t *scales = tile + 2 * TILE, *codes = scales + 16 * TILE;
        for (int s = 0; s < 16; s++, codes += 192) {
            Simd::B w[4];
            q6_k_codes(codes, w);
            const Simd::F by = Simd::mul(d, Simd::signed_bytes(scales + s * TILE));
            for (int r = 0; r < R; r++) {
                const int64_t row = first + r;
                const int8_t *of_x = x.codes + row * x.stride + b * SUPER + s * 16;
                Simd::I sum = Simd::zero_int();
                for (int k = 0; k < 4; k++) sum = Simd::dot(sum, w[k], of_x + k * STEP);
                sum = Simd::add(sum, -32 * x.sums[row * (x.stride / 16) + b * 16 + s]);
                const float scale = x.scales[row * (x.stride / GROUP) + b * 8 + s / 2];
                acc[r] = Simd::fma(Simd::to_float(sum), Simd::mul(by, scale), acc[r]);
            }
        }
    }
    for (int r = 0; r < R; r++) Simd::store(y + r * TILE, acc[r]);
}

// As many rows at a time as the registers hold; then fewer.
#define RQ_PRODUCT(name, rows)                                                                    \
    static void name(const uint8_t *tile, const Activations &x, int64_t first, int64_t count,     \
                     float *y) {                                                                  \
        int64_t i = 0;                                                                            \
        for (; i + Simd::MOST_ROWS <= count; i += Simd::MOST_ROWS)                                \
            rows<Simd::MOST_ROWS>(tile, x, first + i, y + i * TILE);                              \
        if (Simd::MOST_ROWS > 4)                                                                  \
            for (; i + 4 <= count; i += 4) rows<4>(tile, x, first + i, y + i * TILE);             \
        if (Simd::MOST_ROWS > 2)                                                                  \
            for (; i + 2 <= count; i += 2) rows<2>(tile, x, first + i, y + i * TILE);             \
        for (; i < count; i++) rows<1>(tile, x, first + i, y + i * TILE);                         \
    }

RQ_PRODUCT(bf16_product, bf16_rows)
RQ_PRODUCT(q8_0_product, q8_0_rows)
RQ_PRODUCT(q4_k_product, q4_k_rows)
RQ_PRODUCT(q6_k_product, q6_k_rows)
RQ_PRODUCT(f32_product, f32_rows)
#undef RQ_PRODUCT

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
