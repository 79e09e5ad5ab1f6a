// Encoders for any processor.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "exact.h"

#include "encode.h"

namespace rq {
namespace portable {

#ifdef __GNUC__
constexpr int LANES = 4;
#else
constexpr int LANES = 1;
#endif

#include "encode_search.inl"
#include "encode_small.inl"
#include "encode_k.inl"

}  // namespace portable
}  // namespace rq
