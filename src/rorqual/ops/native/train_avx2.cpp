// A training step for processors with AVX2 and FMA.

#if defined(__x86_64__) && defined(__GNUC__)
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <memory>

#include "bf16.h"
#include "train.h"

#pragma GCC target("avx2,fma,f16c")

namespace rq {
namespace avx2 {

constexpr int LANES = 8;
constexpr int TILE_ROWS = 4, TILE_VECTORS = 3;

#include "train_values.inl"
#include "train_rows.inl"
#include "train_router.inl"
#include "train_attention.inl"
#include "train_table.inl"

}  // namespace avx2
}  // namespace rq
#endif
