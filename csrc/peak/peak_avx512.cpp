// Peaks of the 512-bit units: float32 fused multiply-add, bfloat16 dot products (two products per lane), int8 and int16
// dot products (VNNI, four and two per lane). 4 × 4 outer products: 16 accumulators and 8 operands fill 24 of the 32
// registers.
#include <immintrin.h>

#include "peak/peak.h"

#if defined(__AVX512BF16__)

double peak_bf16_avx512(const void* operands, int iterations) {
  const char* data = static_cast<const char*>(operands);
  __m512bh x[4], y[4];
  __m512 acc[16];
  for (int j = 0; j < 4; ++j) {
    x[j] = (__m512bh)_mm512_load_si512(data + 64 * j);
    y[j] = (__m512bh)_mm512_load_si512(data + 256 + 64 * j);
  }
  for (int j = 0; j < 16; ++j) acc[j] = _mm512_setzero_ps();
  for (int i = 0; i < iterations; ++i)
    for (int j = 0; j < 16; ++j) acc[j] = _mm512_dpbf16_ps(acc[j], x[j & 3], y[j >> 2]);
  for (__m512& a : acc) asm volatile("" : : "v"(a));
  return iterations * (16.0 * 32 * 2);
}

#else  // this file is compiled twice, and what every AVX-512 tier has comes from the build without BF16

double peak_fp32_avx512(const void* operands, int iterations) {
  const float* data = static_cast<const float*>(operands);
  __m512 x[4], y[4], acc[16];
  for (int j = 0; j < 4; ++j) x[j] = _mm512_load_ps(data + 16 * j), y[j] = _mm512_load_ps(data + 64 + 16 * j);
  for (int j = 0; j < 16; ++j) acc[j] = _mm512_load_ps(data + 128 + 16 * j);
  for (int i = 0; i < iterations; ++i)
    for (int j = 0; j < 16; ++j) acc[j] = _mm512_fmadd_ps(x[j & 3], y[j >> 2], acc[j]);
  for (__m512& a : acc) asm volatile("" : : "v"(a));
  return iterations * (16.0 * 16 * 2);
}

namespace {

// The type that the instruction computes in: with __m512i, gcc 12 copies the accumulators about inside the loop.
typedef int Int32x16 __attribute__((vector_size(64)));

template <class Dot>
double peak(const void* operands, int iterations, double products, Dot dot) {
  const Int32x16* data = static_cast<const Int32x16*>(operands);
  Int32x16 x[4], y[4], acc[16];
  for (int j = 0; j < 4; ++j) x[j] = data[j], y[j] = data[4 + j];
  for (int j = 0; j < 16; ++j) acc[j] = data[8 + j];
  for (int i = 0; i < iterations; ++i)
    for (int j = 0; j < 16; ++j) acc[j] = (Int32x16)dot((__m512i)acc[j], (__m512i)x[j & 3], (__m512i)y[j >> 2]);
  for (Int32x16& a : acc) asm volatile("" : : "v"(a));
  return iterations * (16 * products * 2);
}

}  // namespace

double peak_int8_avx512(const void* operands, int iterations) {
  return peak(operands, iterations, 64, [](__m512i sum, __m512i x, __m512i y) __attribute__((always_inline)) {
    return _mm512_dpbusd_epi32(sum, x, y);
  });
}

double peak_int16_avx512(const void* operands, int iterations) {
  return peak(operands, iterations, 32, [](__m512i sum, __m512i x, __m512i y) __attribute__((always_inline)) {
    return _mm512_dpwssd_epi32(sum, x, y);
  });
}

#endif
