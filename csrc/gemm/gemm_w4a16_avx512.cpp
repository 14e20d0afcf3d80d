// The product with 4-bit weights for AVX-512: bf16 activations in pairs (VDPBF16PS) where the processor has them, all
// others in float. A nibble is the index of its value in a table that one register holds.
#include "common/avx512.h"

#include "common/steps.h"

namespace sana {
namespace {

// 16 bytes of nibbles. vpermps takes the low 4 bits of an index.
inline void unpack(const uint8_t* nibbles, Vec& even, Vec& odd) {
  const Vec table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
  even = _mm512_permutexvar_ps(bytes, table);
  odd = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
}

#if defined(__AVX512BF16__)
// 32 bytes of nibbles. vpermw takes the low 5 bits of an index, so the table is there twice.
inline void unpack(const uint8_t* nibbles, __m512i& even, __m512i& odd) {
  const __m256i once = reinterpret_cast<__m256i>(
      _mm512_cvtneps_pbh(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)));
  const __m512i table = _mm512_broadcast_i64x4(once);
  const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(nibbles)));
  even = _mm512_permutexvar_epi16(bytes, table);
  odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
}
#endif

}  // namespace
}  // namespace sana

#include "gemm/gemm_w4a16_vector.h"

namespace sana {
namespace {

bool in_pairs(const GemmW4A16& p) { return StepOf16::kNumbers == 2 && p.x_dtype == DType::bf16; }

int64_t bytes_of_row(const GemmW4A16& p) { return in_pairs(p) ? row_bytes<StepOf16>(p) : row_bytes<FloatStep>(p); }

void arrange(const GemmW4A16& p, int64_t row, void* to) {
  if (!in_pairs(p)) return arrange_floats(p, row, to);
  const uint16_t* x = reinterpret_cast<const uint16_t*>(row_of(p, row));
  split_even_odd<StepOf16>(x, p.gemm.K, padded_k(p), static_cast<uint16_t*>(to));
}

void block(const GemmW4A16& p, const Block& block, const char* x, char* panel, float* sums) {
  in_pairs(p) ? block_of<StepOf16>(p, block, x, panel, sums) : block_of<FloatStep>(p, block, x, panel, sums);
}

}  // namespace

const GemmW4A16Kernels SANA_AVX512_NAME(gemm_w4a16) = {bytes_of_row, arrange, block};

}  // namespace sana
