// The epilogue of the matrix product on vectors of columns; include common/avx512.h or common/avx2.h first.
#pragma once

#include "gemm/gemm_cpu.h"

namespace sana {
namespace {

// What the epilogue needs of kLanes columns, the same for every row.
struct Columns {
  Vec scale, bias;

  Columns(const Gemm& p, int64_t n, Lanes lanes = kAllLanes)
      : scale(p.weight_scale == nullptr ? set1(1) : F32::load(p.weight_scale + n, lanes)),
        bias(p.bias == nullptr ? set1(0) : F32::load(p.bias + n, lanes)) {}
};

// Row m, kLanes columns from n on, of which `sum` is the sum of products. Out: E's, or a type whose `store` goes past the
// caches.
template <class E, class Out = E>
inline void finish(const Gemm& p, int64_t m, int64_t n, const Columns& columns, Vec sum, Lanes lanes = kAllLanes) {
  using T = typename E::Type;
  const Vec scale = p.x_scale == nullptr ? columns.scale : columns.scale * set1(p.x_scale[m]);
  Vec y = fmadd(sum, scale, columns.bias);
  if (p.silu) y = sizeof(T) == 4 ? silu(y) : silu_16(y);
  const int64_t index = m * p.out_stride + n;
  if (p.residual != nullptr) {
    const Vec residual = E::load(static_cast<const T*>(p.residual) + index, lanes);
    const auto image = [&] { return int64_t(uint32_t(m) / uint32_t(p.image)); };  // in 64 bits it takes twice as long
    y = p.gate == nullptr ? residual + y : fmadd(F32::load(p.gate + image() * p.N + n, lanes), y, residual);
  }
  Out::store(static_cast<T*>(p.out) + index, lanes, y);
}

}  // namespace
}  // namespace sana
