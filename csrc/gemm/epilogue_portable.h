// The epilogue of the matrix product in plain C++.
#pragma once

#include <math.h>

#include "gemm/gemm.h"

namespace sana {
namespace {

// Sums y of row m, `count` columns from n on, at most 16.
inline void finish(const Gemm& p, int64_t m, int64_t n, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) {
    if (p.x_scale != nullptr) y[i] *= p.x_scale[m] * p.weight_scale[n + i];
    if (p.bias != nullptr) y[i] += p.bias[n + i];
    if (p.silu) y[i] /= 1 + expf(-y[i]);
  }
  if (p.residual != nullptr) {
    float residual[16];
    load_row(at(p.residual, m * p.N + n, p.dtype), p.dtype, count, residual);
    const float* gate = p.gate == nullptr ? nullptr : p.gate + m / p.image * p.N + n;
    for (int64_t i = 0; i < count; ++i) y[i] = residual[i] + (gate == nullptr ? 1 : gate[i]) * y[i];
  }
  store_row(y, p.dtype, count, at(p.out, m * p.N + n, p.dtype));
}

}  // namespace
}  // namespace sana
