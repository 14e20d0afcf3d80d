// Peaks in 256-bit registers: float32 fused multiply-add, where two units of latency 4 or 5 need 8 to 10 accumulators,
// and products of int16 pairs with an addition each.
#include <immintrin.h>

#include "peak/peak.h"

double peak_fp32_avx2(const void* operands, int iterations) {
  const float* data = static_cast<const float*>(operands);
  const __m256 x[2] = {_mm256_load_ps(data), _mm256_load_ps(data + 8)};
  const __m256 y[2] = {_mm256_load_ps(data + 16), _mm256_load_ps(data + 24)};
  __m256 acc[10];
  for (int j = 0; j < 10; ++j) acc[j] = _mm256_load_ps(data + 32 + 8 * j);
  for (int i = 0; i < iterations; ++i)
    for (int j = 0; j < 10; ++j) acc[j] = _mm256_fmadd_ps(x[j & 1], y[(j >> 1) & 1], acc[j]);
  for (__m256& a : acc) asm volatile("" : : "x"(a));
  return iterations * (10.0 * 8 * 2);
}

double peak_int16_avx2(const void* operands, int iterations) {
  const __m256i* data = static_cast<const __m256i*>(operands);
  __m256i x[2] = {data[0], data[1]}, y[4], acc[8];
  for (int j = 0; j < 4; ++j) y[j] = data[2 + j];
  for (int j = 0; j < 8; ++j) acc[j] = data[6 + j];
  for (int i = 0; i < iterations; ++i) {
    asm volatile("" : "+x"(x[0]), "+x"(x[1]));  // or every product would be computed once
    for (int j = 0; j < 8; ++j) acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(x[j & 1], y[j >> 1]));
  }
  for (__m256i& a : acc) asm volatile("" : : "x"(a));
  return iterations * (8.0 * 16 * 2);
}
