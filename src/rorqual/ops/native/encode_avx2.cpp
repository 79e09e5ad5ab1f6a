// Encoders for processors with AVX2.

#if defined(__x86_64__) && defined(__GNUC__)
#include <math.h>
#include <stdint.h>
#include <string.h>

#pragma GCC target("avx2")
#include "exact.h"

#include "encode.h"

namespace rq {
namespace avx2 {

constexpr int LANES = 8;

#include "encode_search.inl"
#include "encode_small.inl"
#include "encode_k.inl"

}  // namespace avx2
}  // namespace rq
#endif
