// Rows of floats to int8 in plain C++, for every portable kernel that quantises.
#pragma once

#include <math.h>
#include <string.h>

#include "gemm/quantize.h"

namespace sana {

// The largest magnitude of a row that comes in parts. Magnitudes are compared as integers, by which a NaN is the
// largest.
struct Largest {
  uint32_t bits = 0;

  void see(const float* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t magnitude = bits_from_float(x[i]) & 0x7fffffffu;
      if (magnitude > bits) bits = magnitude;
    }
  }
  float get() const { return float_from_bits(bits); }
};

// To the nearest integer, ties to even. x * inverse exceeds 127 by no more than its rounding.
static inline void to_int8(const float* x, int64_t count, float inverse, int8_t* values) {
  for (int64_t i = 0; i < count; ++i) {
    const float y = x[i] * inverse;
    values[i] = y == y ? int8_t(lrintf(y)) : int8_t(0);
  }
}

// A whole row: fills quantized_pitch(K) values and returns the scale.
static inline float quantize_row(const float* x, int64_t K, int8_t* values) {
  Largest largest;
  largest.see(x, K);
  const RowScale scale = row_scale(largest.get());
  to_int8(x, K, scale.inverse, values);
  memset(values + K, 0, quantized_pitch(K) - K);
  return scale.scale;
}

}  // namespace sana
