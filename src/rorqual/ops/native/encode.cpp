// Values to GGUF's blocks: checks, and the instruction set's encoder.

#include "encode.h"

#include "multiply.h"
#include "rorqual_native.h"

namespace rq {
namespace {

int64_t block_values(int type) {
    switch (type) {
    case Q4_0: case Q4_1: case Q5_0: case Q5_1: case Q8_0: return 32;
    case Q2_K: case Q3_K: case Q4_K: case Q5_K: case Q6_K: return 256;
    default: return 0;
    }
}

}  // namespace
}  // namespace rq

extern "C" int rq_encode(int type, const float *x, uint8_t *blocks, int64_t num_rows,
                         int64_t num_columns, const float *importance) {
    const int64_t size = rq::block_values(type);
    if (size == 0) return RQ_BAD_KIND;
    if (num_rows < 0 || num_columns < 0 || num_columns % size) return RQ_BAD_SHAPE;
    const rq::Encoding encoding{type, x, blocks, num_rows, num_columns, importance};
    return rq::kernels().encode(encoding) ? RQ_OK : RQ_BAD_VALUE;
}
