// Matrix product for AVX2, without int8 dot products: bytes are widened to 16 bits, and vpmaddwd adds pairs of their
// products into 32. (vpmaddubsw would take bytes, but its 16-bit sums saturate: 2 x 127 x 255 does not fit.)
//
// Register block: 3 rows x 4 vectors, each vector half sums of 4 columns. Per 4 of K: 4 loads, 3 x (broadcast, widen), 12
// multiplies and 12 additions, about 9 cycles of a processor with three vector ports: 21 products per cycle, 1.3 times
// the rate of fp32.
#include "gemm/gemm_avx2.h"

namespace sana {
namespace {

struct Int8 {
  static constexpr int kRows = 3, kSums = 4;
  static constexpr int kBytes = 4 * 32;
  using Sum = __m256i;

  static Sum zero() { return _mm256_setzero_si256(); }

  static const char* panel(const char* weight, int64_t bytes, char* buffer) {
    for (int64_t i = 0; i < bytes * kPanel; i += 16) {
      const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + i));
      _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + 2 * i), _mm256_cvtepi8_epi16(narrow));
    }
    return buffer;
  }

  template <int R>
  static void step(Sum (&sum)[R][kSums], const char* panel, const char* x, int64_t stride) {
    __m256i four[R];
    for (int r = 0; r < R; ++r) four[r] = _mm256_cvtepi8_epi16(_mm_set1_epi32(load_int(x + r * stride)));
    for (int i = 0; i < kSums; ++i) {
      const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 32 * i));
      for (int r = 0; r < R; ++r) sum[r][i] = _mm256_add_epi32(sum[r][i], _mm256_madd_epi16(w, four[r]));
    }
  }

  // Each vector has two half sums of columns 4 i to 4 i + 3.
  static Vec result(const Sum (&sum)[kSums], int half, int) {
    const __m256i mixed = _mm256_hadd_epi32(sum[2 * half], sum[2 * half + 1]);
    return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(mixed, 0xd8));
  }
  static int correction(const char*, int64_t) { return 0; }
};

}  // namespace

const GemmKernels gemm_avx2 = {BFloat16::kRows, kPanel, kScratch, block_by<Int8>};

}  // namespace sana
