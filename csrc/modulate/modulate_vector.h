// Adaptive layer norm and gated residual on vectors; include common/avx512.h or common/avx2.h first. Four sums at once
// cover the adders' latency.
#pragma once

#include <math.h>

#include "gemm/quantize_vector.h"
#include "modulate/modulate_cpu.h"

namespace sana {
namespace {

// The sum of f(k, lanes) over a row; f gives 0 outside its lanes.
template <class F>
float sum_of_row(int64_t C, F f) {
  constexpr int kSums = 4;
  Vec sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kLanes <= C; c += kSums * kLanes)
    for (int i = 0; i < kSums; ++i) sums[i] += f(c + i * kLanes, kAllLanes);
  for (; c < C; c += kLanes) sums[0] += f(c, first_lanes(C - c));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class E>
void modulate(const Modulate& p, const float* shift, const float* scale, int64_t b, int64_t first, int64_t last) {
  using T = typename E::Type;
  for (int64_t n = first; n < last; ++n) {
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + n * p.x.stride[1];
    const Vec mean = set1(sum_of_row(p.C, [&](int64_t c, Lanes lanes) { return E::load(x + c, lanes); }) / float(p.C));
    const float squares = sum_of_row(p.C, [&](int64_t c, Lanes lanes) {
      const Vec centred = select(lanes, E::load(x + c, lanes) - mean, set1(0));
      return centred * centred;
    });
    const Vec rstd = set1(1 / sqrtf(squares / float(p.C) + p.eps));
    const auto y = [&](int64_t c, Lanes lanes) {
      const Vec normal = (E::load(x + c, lanes) - mean) * rstd;
      return fmadd(normal, F32::load(scale + c, lanes), F32::load(shift + c, lanes));
    };
    const int64_t row = b * p.N + n;
    if (p.row_scale == nullptr) {
      T* out = static_cast<T*>(p.out) + row * p.C;
      for_vectors(p.C, [&](int64_t c, Lanes lanes) { E::store(out + c, lanes, y(c, lanes)); });
    } else {
      p.row_scale[row] = quantize_row(p.C, static_cast<int8_t*>(p.out) + row * quantized_pitch(p.C), y);
    }
  }
}

template <class E>
void gate_residual(const GateResidual& p, const float* gate, int64_t b, int64_t first, int64_t last) {
  using T = typename E::Type;
  for (int64_t n = first; n < last; ++n) {
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + n * p.x.stride[1];
    const T* y = static_cast<const T*>(p.y.data) + b * p.y.stride[0] + n * p.y.stride[1];
    T* out = static_cast<T*>(p.out) + (b * p.N + n) * p.C;
    for_vectors(p.C, [&](int64_t c, Lanes lanes) {
      const Vec g = F32::load(gate + c, lanes);
      E::store(out + c, lanes, fmadd(g, E::load(y + c, lanes), E::load(x + c, lanes)));
    });
  }
}

void modulate_any(const Modulate& p, const float* shift, const float* scale, int64_t b, int64_t first, int64_t last) {
  if (p.dtype == DType::f32) return modulate<F32>(p, shift, scale, b, first, last);
  if (p.dtype == DType::f16) return modulate<F16>(p, shift, scale, b, first, last);
  modulate<BF16>(p, shift, scale, b, first, last);
}

void gate_residual_any(const GateResidual& p, const float* gate, int64_t b, int64_t first, int64_t last) {
  if (p.dtype == DType::f32) return gate_residual<F32>(p, gate, b, first, last);
  if (p.dtype == DType::f16) return gate_residual<F16>(p, gate, b, first, last);
  gate_residual<BF16>(p, gate, b, first, last);
}

}  // namespace
}  // namespace sana
