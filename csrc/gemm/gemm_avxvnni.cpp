// Matrix product for AVX-VNNI: the int8 dot products of AVX-512 on vectors of 8 columns (gemm_avx512.cpp tells how signed
// bytes are multiplied). Register block: 6 rows x 2 vectors.
#include "gemm/gemm_avx2.h"

namespace sana {
namespace {

struct Int8 {
  static constexpr int kRows = 6, kSums = 2;
  static constexpr int kBytes = 64;
  // The type that the instruction computes in: with __m256i, gcc 12 copies the sums about inside the loop.
  typedef int Sum __attribute__((vector_size(32)));

  static Sum zero() { return Sum{}; }
  static const char* panel(const char* weight, int64_t, char*) { return weight; }

  template <int R>
  static void step(Sum (&sum)[R][kSums], const char* panel, const char* x, int64_t stride) {
    __m256i w[kSums];
    for (int i = 0; i < kSums; ++i)
      w[i] = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * i)), _mm256_set1_epi8(-128));
    for (int r = 0; r < R; ++r) {
      const __m256i four = _mm256_set1_epi32(load_int(x + r * stride));
      for (int i = 0; i < kSums; ++i) sum[r][i] = (Sum)_mm256_dpbusd_avx_epi32((__m256i)sum[r][i], w[i], four);
    }
  }

  static Vec result(const Sum (&sum)[kSums], int half, int correction) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32((__m256i)sum[half], _mm256_set1_epi32(correction)));
  }

  // 128 * sum(x) of a row.
  static int correction(const char* x, int64_t bytes) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < bytes; k += 32)
      sum = _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k)));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_hadd_epi32(four, four);
    return 128 * (_mm_cvtsi128_si32(four) + _mm_extract_epi32(four, 1));
  }
};

}  // namespace

const GemmKernels gemm_avxvnni = {Int8::kRows, kPanel, kScratch, block_by<Int8>};

}  // namespace sana
