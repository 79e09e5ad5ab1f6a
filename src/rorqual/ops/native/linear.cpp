// Products of packed matrices with rows of activations, and which kernels do them.

#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <memory>
#include <new>

#include "bf16.h"
#include "multiply.h"
#include "pool.h"
#include "rorqual_layers.h"

namespace rq {
namespace {

const Kernels &chosen() {
    const char *most = getenv("RORQUAL_CPU");
    const bool is_portable = most != nullptr && strcmp(most, "portable") == 0;
#ifdef RQ_X86
    const bool is_avx2 = most != nullptr && strcmp(most, "avx2") == 0;
    if (!is_portable && !is_avx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bf16"))
        return avx512::table;
    if (!is_portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return avx2::table;
#endif
    return portable::table;
}

}  // namespace

const Kernels &kernels() {
    static const Kernels &the_kernels = chosen();
    return the_kernels;
}

const RowKernels &row_kernels() { return *kernels().rows; }

namespace {

// Rows of x in the form that a kind of weights wants.
class Prepared {
  public:
    bool make(int kind, const void *x, int64_t num_x, int64_t width, int dtype) {
        x_ = x;
        width_ = width;
        dtype_ = dtype;
        const int64_t size = num_x * width;
        if (kind == RQ_F32 && dtype == RQ_FLOAT32) {
            view_ = {nullptr, nullptr, nullptr, nullptr, static_cast<const float *>(x), width, width};
            return true;
        }
        if (kind == RQ_F32) {
            floats_.reset(new (std::nothrow) float[size]);
            if (!floats_) return false;
            for (int64_t i = 0; i < size; i++) floats_[i] = from_bf16(static_cast<const uint16_t *>(x)[i]);
        } else if (kind == RQ_BF16) {
            if (dtype == RQ_BFLOAT16) {
                view_ = {nullptr, nullptr, nullptr, static_cast<const uint16_t *>(x), nullptr, width, width};
                return true;
            }
            pairs_.reset(new (std::nothrow) uint16_t[size]);
            if (!pairs_) return false;
            for (int64_t i = 0; i < size; i++) pairs_[i] = to_bf16(static_cast<const float *>(x)[i]);
        } else {
            codes_.reset(new (std::nothrow) int8_t[size]);
            scales_.reset(new (std::nothrow) float[size / GROUP]);
            sums_.reset(new (std::nothrow) int32_t[size / 16]);
            if (!codes_ || !scales_ || !sums_) return false;
            if (!parallel(quantise, this, num_x)) return false;
        }
        view_ = {codes_.get(), scales_.get(), sums_.get(), pairs_.get(), floats_.get(), width,
                 width};
        return true;
    }

    const Activations &view() const { return view_; }

  private:
    static void quantise(void *context, int64_t first, int64_t last) {
        Prepared &p = *static_cast<Prepared *>(context);
        const int64_t width = p.width_;
        std::unique_ptr<float[]> row(p.dtype_ == RQ_BFLOAT16 ? new float[width] : nullptr);
        for (int64_t i = first; i < last; i++) {
            const float *x = static_cast<const float *>(p.x_) + i * width;
            if (row) {
                const uint16_t *narrow_x = static_cast<const uint16_t *>(p.x_) + i * width;
                for (int64_t k = 0; k < width; k++) row[k] = from_bf16(narrow_x[k]);
                x = row.get();
            }
            kernels().quantise(x, width, p.codes_.get() + i * width,
                               p.scales_.get() + i * (width / GROUP),
                               p.sums_.get() + i * (width / 16));
        }
    }

    const void *x_ = nullptr;
    int64_t width_ = 0;
    int dtype_ = 0;
    std::unique_ptr<int8_t[]> codes_;
    std::unique_ptr<float[]> scales_;
    std::unique_ptr<int32_t[]> sums_;
    std::unique_ptr<uint16_t[]> pairs_;
    std::unique_ptr<float[]> floats_;
    Activations view_{};
};

// One product of a call: some rows of x with a matrix of the stack.
struct Part {
    int64_t matrix, first, count, work;  // work: of all parts before it
};

struct Products {
    int kind;
    const uint8_t *packed;
    size_t tile_bytes;
    int64_t num_tiles, num_rows;  // of a matrix
    const Activations *x;
    const Part *parts;
    int64_t num_parts;
    void *y;
    int dtype;
};

// Choice: rows of a part. A tile costs a thread what its rows cost, or reading it.
constexpr int64_t PART_ROWS = 128, READING = 4;

int64_t work_of(int64_t count) { return count < READING ? READING : count; }

// Tiles [tile, tile + num) of a part, in float32, or narrowed.
void multiply_part(const Products &p, const Part &part, int64_t tile, int64_t num) {
    const Tiles tiles{p.packed + (part.matrix * p.num_tiles + tile) * p.tile_bytes, p.tile_bytes,
                      num};
    const int64_t start = tile * TILE, left = p.num_rows - start;
    const int64_t width = left < num * TILE ? left : num * TILE, at = part.first * p.num_rows + start;
    const Product product = kernels().kinds[p.kind].product;
    if (p.dtype == RQ_FLOAT32) {
        float *y = static_cast<float *>(p.y) + at;
        product(tiles, *p.x, part.first, part.count, {y, p.num_rows, width, false});
        return;
    }
    std::unique_ptr<float[]> sums(new float[part.count * width]);
    product(tiles, *p.x, part.first, part.count, {sums.get(), width, width, false});
    uint16_t *y = static_cast<uint16_t *>(p.y) + at;
    for (int64_t i = 0; i < part.count; i++)
        for (int64_t k = 0; k < width; k++) y[i * p.num_rows + k] = to_bf16(sums[i * width + k]);
}

// A thread does the tiles that begin within its share of the work.
void multiply_share(void *context, int64_t first, int64_t last) {
    const auto start = std::chrono::steady_clock::now();
    const Products &p = *static_cast<Products *>(context);
    for (int64_t i = 0; i < p.num_parts && p.parts[i].work < last; i++) {
        const Part &part = p.parts[i];
        const int64_t cost = work_of(part.count);
        const auto begins_at = [&](int64_t work) {
            const int64_t tile = (work - part.work + cost - 1) / cost;
            return tile < p.num_tiles ? tile : p.num_tiles;
        };
        const int64_t from = first <= part.work ? 0 : begins_at(first), to = begins_at(last);
        if (from < to) multiply_part(p, part, from, to - from);
    }
    if (first > 0) return;
    double seconds[RQ_PARTS] = {};
    seconds[RQ_MATRIX] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    add_seconds(seconds);
}

}  // namespace

void multiply(const Matrix &m, int64_t tile, int64_t num_tiles, const Activations &x, int64_t first,
              int64_t count, float *y, int64_t stride_y, bool adds) {
    const size_t tile_bytes = row_bytes(m.kind, m.columns) * TILE;
    const int64_t left = m.rows - tile * TILE, most = (left + TILE - 1) / TILE;
    const Tiles tiles{m.packed + tile * tile_bytes, tile_bytes, num_tiles < most ? num_tiles : most};
    const int64_t width = left < tiles.num * TILE ? left : tiles.num * TILE;
    kernels().kinds[m.kind].product(tiles, x, first, count, {y, stride_y, width, adds});
}

void decode(const Matrix &m, int64_t tile, float *rows) {
    const size_t tile_bytes = row_bytes(m.kind, m.columns) * TILE;
    kernels().kinds[m.kind].decode(m.packed + tile * tile_bytes, m.columns, rows);
}

}  // namespace rq

extern "C" {

int rq_abi(void) { return RQ_ABI; }

const char *rq_level(void) { return rq::kernels().level; }

void rq_set_threads(int num_threads) { rq::set_threads(num_threads); }

int rq_decode_rows(int kind, const uint8_t *packed, int64_t num_rows, int64_t num_columns,
                   const int64_t *ids, int64_t num_ids, float *rows) {
    if (rq::row_bytes(kind, num_columns) == 0) return RQ_BAD_SHAPE;
    const rq::Matrix matrix{kind, num_rows, num_columns, packed};
    std::unique_ptr<float[]> tile(new (std::nothrow) float[rq::TILE * num_columns]);
    if (!tile) return RQ_NO_MEMORY;
    for (int64_t i = 0; i < num_ids; i++) {
        if (ids[i] < 0 || ids[i] >= num_rows) return RQ_BAD_SHAPE;
        rq::decode(matrix, ids[i] / rq::TILE, tile.get());
        memcpy(rows + i * num_columns, tile.get() + ids[i] % rq::TILE * num_columns,
               num_columns * sizeof(float));
    }
    return RQ_OK;
}

int rq_decode(int kind, const uint8_t *packed, float *rows, int64_t num_rows, int64_t num_columns) {
    if (rq::row_bytes(kind, num_columns) == 0 || num_rows < 1) return RQ_BAD_SHAPE;
    const rq::Matrix matrix{kind, num_rows, num_columns, packed};
    std::unique_ptr<float[]> last(new (std::nothrow) float[rq::TILE * num_columns]);
    if (!last) return RQ_NO_MEMORY;
    for (int64_t first = 0; first < num_rows; first += rq::TILE) {
        const int64_t left = num_rows - first, num = left < rq::TILE ? left : rq::TILE;
        float *to = rows + first * num_columns;
        rq::decode(matrix, first / rq::TILE, num < rq::TILE ? last.get() : to);
        if (num < rq::TILE) memcpy(to, last.get(), num * num_columns * sizeof(float));
    }
    return RQ_OK;
}

int rq_linear(int kind, const uint8_t *packed, int64_t num_rows, int64_t num_columns,
              const void *x, void *y, int64_t num_x, int dtype) {
    return rq_grouped(kind, packed, 1, num_rows, num_columns, x, y, &num_x, dtype);
}

int rq_grouped(int kind, const uint8_t *packed, int64_t num_matrices, int64_t num_rows,
               int64_t num_columns, const void *x, void *y, const int64_t *counts, int dtype) {
    const size_t row_bytes = rq::row_bytes(kind, num_columns);
    if (row_bytes == 0 || num_rows < 1 || num_matrices < 1) return RQ_BAD_SHAPE;
    int64_t num_x = 0, num_parts = 0;
    for (int64_t e = 0; e < num_matrices; e++) {
        if (counts[e] < 0) return RQ_BAD_SHAPE;
        num_x += counts[e];
        num_parts += (counts[e] + rq::PART_ROWS - 1) / rq::PART_ROWS;
    }
    if (num_x == 0) return RQ_OK;
    std::unique_ptr<rq::Part[]> parts(new (std::nothrow) rq::Part[num_parts]);
    rq::Prepared prepared;
    if (!parts || !prepared.make(kind, x, num_x, num_columns, dtype)) return RQ_NO_MEMORY;
    const int64_t num_tiles = (num_rows + rq::TILE - 1) / rq::TILE;
    int64_t first = 0, work = 0, part = 0;
    for (int64_t e = 0; e < num_matrices; e++)
        for (int64_t i = 0; i < counts[e]; i += rq::PART_ROWS) {
            const int64_t left = counts[e] - i, count = left < rq::PART_ROWS ? left : rq::PART_ROWS;
            parts[part++] = {e, first, count, work};
            first += count;
            work += num_tiles * rq::work_of(count);
        }
    rq::Products products{kind, packed, row_bytes * rq::TILE, num_tiles, num_rows,
                          &prepared.view(), parts.get(), num_parts, y, dtype};
    return rq::parallel(rq::multiply_share, &products, work) ? RQ_OK : RQ_NO_MEMORY;
}
}
