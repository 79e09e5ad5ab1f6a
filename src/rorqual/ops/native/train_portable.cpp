// A training step for any processor.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <memory>

#include "bf16.h"
#include "train.h"

namespace rq {
namespace portable {

#ifdef __GNUC__
constexpr int LANES = 4;
#else
constexpr int LANES = 1;
#endif
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;

#include "train_values.inl"
#include "train_rows.inl"
#include "train_router.inl"
#include "train_attention.inl"
#include "train_table.inl"

}  // namespace portable
}  // namespace rq
