// Weights of a tile as floats, 16 rows of `width` values one after the other, written once for all
// instruction sets. Included after products.inl: the `Simd` there is the one here.

// Values k to k + 4 of 16 rows, in the four bytes of each row's 32 bits.
static inline void decode_step(Simd::B w, Simd::F by, Simd::F off, Simd::F *values) {
    values[0] = Simd::fma(Simd::byte_of<0>(w), by, off);
    values[1] = Simd::fma(Simd::byte_of<1>(w), by, off);
    values[2] = Simd::fma(Simd::byte_of<2>(w), by, off);
    values[3] = Simd::fma(Simd::byte_of<3>(w), by, off);
}

static void bf16_decode(const uint8_t *tile, int64_t width, float *rows) {
    Simd::F values[16] = {};
    for (int64_t k = 0; k < width; k += 16) {
        const int64_t num = width - k < 16 ? width - k : 16;
        for (int64_t j = 0; j < num; j += 2)
            Simd::widen_pairs(tile + (k + j) / 2 * BF16_BLOCK, values[j], values[j + 1]);
        Simd::store_transposed(values, rows + k, width, num);
    }
}

static void f32_decode(const uint8_t *tile, int64_t width, float *rows) {
    Simd::F values[16] = {};
    for (int64_t k = 0; k < width; k += 16) {
        const int64_t num = width - k < 16 ? width - k : 16;
        for (int64_t j = 0; j < num; j++) values[j] = Simd::floats(tile + (k + j) * F32_BLOCK);
        Simd::store_transposed(values, rows + k, width, num);
    }
}

static void q8_0_decode(const uint8_t *tile, int64_t width, float *rows) {
    Simd::F values[16];
    for (int64_t b = 0; b < width / GROUP; b++, tile += Q8_0_BLOCK) {
        const Simd::F by = Simd::halves(tile), off = Simd::mul(by, -128.0f);
        for (int half = 0; half < 2; half++) {
            for (int k = 0; k < 4; k++)
                decode_step(Simd::excess_128(Simd::load(tile + 2 * TILE + (4 * half + k) * 64)), by,
                            off, values + 4 * k);
            Simd::store_transposed(values, rows + b * GROUP + half * 16, width, 16);
        }
    }
}

static void q4_k_decode(const uint8_t *tile, int64_t width, float *rows) {
    Simd::F values[16];
    Unpacked block;
    for (int64_t b = 0; b < width / SUPER; b++, tile += Q4_K_BLOCK) {
        Q4_K::unpack(tile, block);
        for (int half = 0; half < 16; half++) {
            const Simd::F by = Simd::load_floats(block.by + half / 2 * TILE);
            const Simd::F off = Simd::mul(Simd::load_floats(block.off + half / 2 * TILE), -1.0f);
            for (int k = 0; k < 4; k++)
                decode_step(Simd::load(block.codes + (half * 4 + k) * 64), by, off, values + 4 * k);
            Simd::store_transposed(values, rows + b * SUPER + half * 16, width, 16);
        }
    }
}

static void q6_k_decode(const uint8_t *tile, int64_t width, float *rows) {
    Simd::F values[16];
    for (int64_t b = 0; b < width / SUPER; b++, tile += Q6_K_BLOCK) {
        const uint8_t *codes = tile + 18 * TILE;
        for (int s = 0; s < 16; s++, codes += 192) {
            Simd::B w[4];
            Q6_K::codes_of(codes, w);
            const Simd::F by = Q6_K::scale(tile, s);
            const Simd::F off = Simd::mul(by, -32.0f);
            for (int k = 0; k < 4; k++) decode_step(w[k], by, off, values + 4 * k);
            Simd::store_transposed(values, rows + b * SUPER + s * 16, width, 16);
        }
    }
}
