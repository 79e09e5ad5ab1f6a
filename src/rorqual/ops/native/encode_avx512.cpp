// Encoders for processors with AVX-512.

#if defined(__x86_64__) && defined(__GNUC__)
#include <math.h>
#include <stdint.h>
#include <string.h>

#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512dq")
#include "exact.h"

#include "encode.h"

namespace rq {
namespace avx512 {

constexpr int LANES = 16;

#include "encode_search.inl"
#include "encode_small.inl"
#include "encode_k.inl"

}  // namespace avx512
}  // namespace rq
#endif
