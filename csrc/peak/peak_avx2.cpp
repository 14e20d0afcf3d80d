// Peak of float32 fused multiply-add in 256-bit registers: two units of latency 4 or 5 need 8 to 10 accumulators.
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
