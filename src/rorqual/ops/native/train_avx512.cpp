// A training step for processors with AVX-512.

#if defined(__x86_64__) && defined(__GNUC__)
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <memory>

#include "bf16.h"
#include "train.h"

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

namespace rq {
namespace avx512 {

constexpr int LANES = 16;
constexpr int TILE_ROWS = 8, TILE_VECTORS = 3;

#include "train_values.inl"
#include "train_rows.inl"
#include "train_router.inl"
#include "train_attention.inl"
#include "train_table.inl"

}  // namespace avx512
}  // namespace rq
#endif
