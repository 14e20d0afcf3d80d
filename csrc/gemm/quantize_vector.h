// Rows of int8 made of vectors of floats, for every kernel that quantises; include common/avx512.h or common/avx2.h
// first.
#pragma once

#include <string.h>

#include "gemm/quantize_cpu.h"

namespace sana {
namespace {

// Writes a row of quantized_pitch(K) values; f(k, lanes) are its elements k, k + 1, ... as floats.
template <class F>
void store_quantized_row(int64_t K, RowScale scale, int8_t* values, F f) {
  const Vec inverse = set1(scale.inverse);
  store_int8_row(values, K, [&](int64_t k, Lanes lanes) { return f(k, lanes) * inverse; });
  memset(values + K, 0, quantized_pitch(K) - K);
}

// The largest magnitude among f(k, lanes) of a row; NaN if there is one.
template <class F>
float largest_of_row(int64_t K, F f) {
  Vec largest = set1(0);
  for_vectors(K, [&](int64_t k, Lanes lanes) { largest = magnitude_max(largest, f(k, lanes)); });
  return largest_magnitude(largest);
}

// Both for a row whose elements are cheap to compute twice. Returns its scale.
template <class F>
float quantize_row(int64_t K, int8_t* values, F f) {
  const RowScale scale = row_scale(largest_of_row(K, f));
  store_quantized_row(K, scale, values, f);
  return scale.scale;
}

template <class E>
void quantize_rows(const Quantize& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const typename E::Type* x = static_cast<const typename E::Type*>(p.x) + row * p.stride;
    p.scale[row] = quantize_row(p.K, p.values + row * quantized_pitch(p.K),
                                [&](int64_t k, Lanes lanes) { return E::load(x + k, lanes); });
  }
}

inline void quantize_rows_any(const Quantize& p, int64_t first, int64_t last) {
  if (p.dtype == DType::f32) return quantize_rows<F32>(p, first, last);
  if (p.dtype == DType::f16) return quantize_rows<F16>(p, first, last);
  quantize_rows<BF16>(p, first, last);
}

}  // namespace
}  // namespace sana
