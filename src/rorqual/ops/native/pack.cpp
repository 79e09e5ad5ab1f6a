// From rows of blocks, as files have them, to tiles of 16 rows, and back. Rows that a last tile
// lacks are zeros.

#include <string.h>

#include "formats.h"
#include "pool.h"
#include "rorqual_native.h"

namespace rq {

size_t row_bytes(int kind, int64_t columns) {
    switch (kind) {
    case RQ_BF16: return columns % 2 ? 0 : columns * 2;
    case RQ_Q8_0: return columns % GROUP ? 0 : columns / GROUP * 34;
    case RQ_Q4_K: return columns % SUPER ? 0 : columns / SUPER * 144;
    case RQ_Q6_K: return columns % SUPER ? 0 : columns / SUPER * 210;
    case RQ_F32: return columns * 4;
    default: return 0;
    }
}

namespace {

// Each writes, or reads, one row's place i in a tile's block.
struct Mover {
    bool is_back;
    void move(uint8_t *row, uint8_t *tile, size_t size) const {
        if (is_back)
            memcpy(row, tile, size);
        else
            memcpy(tile, row, size);
    }
};

void q8_0_block(const Mover &m, uint8_t *row, uint8_t *tile, int i) {
    m.move(row, tile + 2 * i, 2);
    for (int k = 0; k < GROUP / STEP; k++)
        m.move(row + 2 + k * STEP, tile + 2 * TILE + k * 64 + i * STEP, STEP);
}

void q4_k_block(const Mover &m, uint8_t *row, uint8_t *tile, int i) {
    m.move(row, tile + 2 * i, 2);
    m.move(row + 2, tile + 2 * TILE + 2 * i, 2);
    for (int s = 0; s < 12; s++) m.move(row + 4 + s, tile + 4 * TILE + s * TILE + i, 1);
    uint8_t *codes = tile + 16 * TILE;
    for (int k = 0; k < 32; k++) m.move(row + 16 + k * STEP, codes + k * 64 + i * STEP, STEP);
}

// GGUF's order within a half of 128 values: value l + 32 j has its low nibble in byte l of the
// first 32 (j = 0, 2) or the second (1, 3), low or high, and its pair of bits j in byte l.
uint8_t q6_k_code(const uint8_t *row, int value) {
    const int half = value / 128, j = value % 128 / 32, l = value % 32;
    const uint8_t low = row[half * 64 + (j & 1) * 32 + l], high = row[128 + half * 32 + l];
    return (j < 2 ? low & 15 : low >> 4) | (((high >> (2 * j)) & 3) << 4);
}

void put_q6_k_code(uint8_t *row, int value, uint8_t code) {
    const int half = value / 128, j = value % 128 / 32, l = value % 32;
    row[half * 64 + (j & 1) * 32 + l] |= (code & 15) << (j < 2 ? 0 : 4);
    row[128 + half * 32 + l] |= (code >> 4) << (2 * j);
}

void q6_k_block(const Mover &m, uint8_t *row, uint8_t *tile, int i) {
    m.move(row + 208, tile + 2 * i, 2);
    for (int s = 0; s < 16; s++) m.move(row + 192 + s, tile + 2 * TILE + s * TILE + i, 1);
    if (m.is_back) memset(row, 0, 192);
    for (int s = 0; s < 16; s++) {
        uint8_t *codes = tile + 18 * TILE + s * 192;
        for (int t = 0; t < 16; t++) {
            const int k = t / STEP, at = i * STEP + t % STEP;
            uint8_t &low = codes[(k / 2) * 64 + at], &high = codes[128 + at];
            const int low_shift = k % 2 * 4, high_shift = 2 * k;
            if (m.is_back) {
                const uint8_t code =
                    ((low >> low_shift) & 15) | (((high >> high_shift) & 3) << 4);
                put_q6_k_code(row, s * 16 + t, code);
            } else {
                const uint8_t code = q6_k_code(row, s * 16 + t);
                low |= (code & 15) << low_shift;
                high |= (code >> 4) << high_shift;
            }
        }
    }
}

void word_block(const Mover &m, uint8_t *row, uint8_t *tile, int i) { m.move(row, tile + 4 * i, 4); }

struct Form {
    void (*block)(const Mover &, uint8_t *, uint8_t *, int);
    size_t row_block, tile_block;
};

const Form FORMS[] = {
    {word_block, 4, BF16_BLOCK},
    {q8_0_block, 34, Q8_0_BLOCK},
    {q4_k_block, 144, Q4_K_BLOCK},
    {q6_k_block, 210, Q6_K_BLOCK},
    {word_block, 4, F32_BLOCK},
};

struct Packing {
    Mover mover;
    Form form;
    uint8_t *rows, *packed;
    int64_t num_rows;
    size_t row_bytes;
};

void pack_tiles(void *context, int64_t first, int64_t last) {
    const Packing &p = *static_cast<Packing *>(context);
    for (int64_t t = first; t < last; t++) {
        uint8_t *tile = p.packed + t * TILE * p.row_bytes;
        if (!p.mover.is_back) memset(tile, 0, TILE * p.row_bytes);
        for (int i = 0; i < TILE && t * TILE + i < p.num_rows; i++) {
            uint8_t *row = p.rows + (t * TILE + i) * p.row_bytes;
            for (size_t b = 0; b < p.row_bytes / p.form.row_block; b++)
                p.form.block(p.mover, row + b * p.form.row_block, tile + b * p.form.tile_block, i);
        }
    }
}

int pack(bool is_back, int kind, const uint8_t *rows, const uint8_t *packed, int64_t num_rows,
         int64_t columns) {
    const size_t size = row_bytes(kind, columns);
    if (size == 0 || num_rows < 1) return RQ_BAD_SHAPE;
    Packing packing{{is_back}, FORMS[kind], const_cast<uint8_t *>(rows),
                    const_cast<uint8_t *>(packed), num_rows, size};
    return parallel(pack_tiles, &packing, (num_rows + TILE - 1) / TILE) ? RQ_OK : RQ_NO_MEMORY;
}

}  // namespace
}  // namespace rq

extern "C" {

size_t rq_packed_bytes(int kind, int64_t num_rows, int64_t num_columns) {
    return (num_rows + rq::TILE - 1) / rq::TILE * rq::TILE * rq::row_bytes(kind, num_columns);
}

int rq_pack(int kind, const uint8_t *rows, uint8_t *packed, int64_t num_rows,
            int64_t num_columns) {
    return rq::pack(false, kind, rows, packed, num_rows, num_columns);
}

int rq_unpack(int kind, const uint8_t *packed, uint8_t *rows, int64_t num_rows,
              int64_t num_columns) {
    return rq::pack(true, kind, rows, packed, num_rows, num_columns);
}
}
