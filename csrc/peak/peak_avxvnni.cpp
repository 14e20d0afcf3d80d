// Peaks of AVX-VNNI: int8 and int16 dot products on vectors of 8 sums. 2 x 4 outer products: 8 accumulators and 6
// operands.
#include <immintrin.h>

#include "peak/peak.h"

namespace {

// The type that the instruction computes in: with __m256i, gcc 12 copies the accumulators about inside the loop.
typedef int Int32x8 __attribute__((vector_size(32)));

template <class Dot>
double peak(const void* operands, int iterations, double products, Dot dot) {
  const Int32x8* data = static_cast<const Int32x8*>(operands);
  Int32x8 x[2], y[4], acc[8];
  for (int j = 0; j < 2; ++j) x[j] = data[j];
  for (int j = 0; j < 4; ++j) y[j] = data[2 + j];
  for (int j = 0; j < 8; ++j) acc[j] = data[6 + j];
  for (int i = 0; i < iterations; ++i)
    for (int j = 0; j < 8; ++j) acc[j] = (Int32x8)dot((__m256i)acc[j], (__m256i)x[j & 1], (__m256i)y[j >> 1]);
  for (Int32x8& a : acc) asm volatile("" : : "x"(a));
  return iterations * (8 * products * 2);
}

}  // namespace

double peak_int8_avxvnni(const void* operands, int iterations) {
  return peak(operands, iterations, 32, [](__m256i sum, __m256i x, __m256i y) __attribute__((always_inline)) {
    return _mm256_dpbusd_avx_epi32(sum, x, y);
  });
}

double peak_int16_avxvnni(const void* operands, int iterations) {
  return peak(operands, iterations, 16, [](__m256i sum, __m256i x, __m256i y) __attribute__((always_inline)) {
    return _mm256_dpwssd_avx_epi32(sum, x, y);
  });
}
