/* The packed forms, and what the kernels of a processor offer. */
#ifndef RORQUAL_FORMATS_H
#define RORQUAL_FORMATS_H

#include <stddef.h>
#include <stdint.h>

namespace rq {

constexpr int TILE = 16;         // output rows of a tile
constexpr int GROUP = 32;        // activations that share a scale
constexpr int SUPER = 256;       // values of a K-quant's block
constexpr int NUM_KINDS = 5;     // rq_kind
constexpr int STEP = 4;          // inputs that one instruction takes of a row

// Bytes of a tile's block: of 32 values (Q8_0), 256 (K-quants), 2 (BF16), 1 (F32).
constexpr size_t Q8_0_BLOCK = TILE * 34, Q4_K_BLOCK = TILE * 144, Q6_K_BLOCK = TILE * 210;
constexpr size_t BF16_BLOCK = TILE * 4, F32_BLOCK = TILE * 4;

// Rows of activations, `stride` values from one to the next, which quantised is a multiple of 32.
// Quantised: codes, a scale for each 32, sums of codes for each 16. BF16: pairs. F32: floats.
struct Activations {
    const int8_t *codes;
    const float *scales;
    const int32_t *sums;
    const uint16_t *pairs;
    const float *floats;
    int64_t width, stride;
};

// `num` tiles, one after the other, of a matrix's packed bytes.
struct Tiles {
    const uint8_t *packed;
    size_t tile_bytes;
    int64_t num;
};

// Rows of results, `stride` floats from one to the next, `width` of each written or added to.
struct Output {
    float *y;
    int64_t stride, width;
    bool adds;
};

// Tiles times rows [first, first + count) of x.
using Product = void (*)(const Tiles &w, const Activations &x, int64_t first, int64_t count,
                         const Output &to);
using Quantise = void (*)(const float *x, int64_t width, int8_t *codes, float *scales,
                          int32_t *sums);

// A tile's weights, 16 rows of `width` floats.
using Decode = void (*)(const uint8_t *tile, int64_t width, float *rows);

struct KindKernels {
    Product product;
    Decode decode;
};

struct RowKernels;  // vector.h
struct Encoding;    // encode.h
using Train = void (*)(const void *arguments, int64_t first, int64_t last);  // train.h

// All that is written once for each instruction set; table.inl fills it in.
struct Kernels {
    const char *level;
    KindKernels kinds[NUM_KINDS];  // by rq_kind
    Quantise quantise;
    const RowKernels *rows;
    bool (*encode)(const Encoding &);  // false for a scale that float16 does not hold
    const Train *train;                // by train.h's Operation
};

#define RQ_LEVEL(name) \
    namespace name { \
    extern const Kernels table; \
    extern const RowKernels rows; \
    bool encode(const Encoding &); \
    extern const Train train[]; \
    }
RQ_LEVEL(portable)
#if defined(__x86_64__) && defined(__GNUC__)
#define RQ_X86 1
RQ_LEVEL(avx2)
RQ_LEVEL(avx512)
#endif
#undef RQ_LEVEL

}  // namespace rq
#endif
