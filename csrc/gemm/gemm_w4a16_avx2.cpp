// The product with 4-bit weights for AVX2, in float: 8 bytes of nibbles become two vectors of 8.
#include "common/avx2.h"

#include "common/steps.h"

namespace sana {
namespace {

inline void unpack(const uint8_t* nibbles, Vec& even, Vec& odd) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(nibbles)));
  even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 28), 28));
  odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 24), 28));
}

}  // namespace
}  // namespace sana

#include "gemm/gemm_w4a16_vector.h"

namespace sana {

const GemmW4A16Kernels gemm_w4a16_avx2 = {row_bytes<FloatStep>, arrange_floats, block_of<FloatStep>};

}  // namespace sana
