// The epilogue of the matrix product on vectors of columns; include common/avx512.h or common/avx2.h first.
#pragma once

#include "gemm/gemm_cpu.h"

namespace sana {
namespace {

// Finishes rows of V vectors of columns, `apart` columns apart, from column n on. It keeps a copy of all that it needs:
// after a store, which for all a compiler knows may have changed it, the Gemm's own would be read again. Out: E's, or a
// type whose `store` goes past the caches.
template <class E, int V = 1, class Out = E>
class Epilogue {
  using T = typename E::Type;

 public:
  Epilogue(const Gemm& p, int64_t n, Lanes lanes = kAllLanes, int64_t apart = kLanes)
      : lanes_(lanes),
        apart_(apart),
        stride_(p.out_stride),
        N_(p.N),
        image_(uint32_t(p.image)),
        silu_(p.silu),
        x_scale_(p.x_scale),
        gate_(p.gate == nullptr ? nullptr : p.gate + n),
        residual_(p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + n),
        out_(static_cast<T*>(p.out) + n) {
    for (int v = 0; v < V; ++v) {
      scale_[v] = p.weight_scale == nullptr ? set1(1) : F32::load(p.weight_scale + n + apart_ * v, lanes);
      bias_[v] = p.bias == nullptr ? set1(0) : F32::load(p.bias + n + apart_ * v, lanes);
    }
  }

  // Row m, of which `sum` are the sums of products.
  void operator()(int64_t m, const Vec (&sum)[V]) const {
    const Vec x_scale = x_scale_ == nullptr ? set1(1) : set1(x_scale_[m]);
    const int64_t at = m * stride_;
    Vec y[V];
    for (int v = 0; v < V; ++v) y[v] = fmadd(sum[v], scale_[v] * x_scale, bias_[v]);
    if (silu_)
      for (int v = 0; v < V; ++v) y[v] = sizeof(T) == 4 ? silu(y[v]) : silu_16(y[v]);
    if (residual_ != nullptr) {
      Vec residual[V];
      for (int v = 0; v < V; ++v) residual[v] = E::load(residual_ + at + apart_ * v, lanes_);
      if (gate_ != nullptr) {
        const float* const gate = gate_ + int64_t(uint32_t(m) / image_) * N_;  // in 64 bits it takes twice as long
        for (int v = 0; v < V; ++v) y[v] = fmadd(F32::load(gate + apart_ * v, lanes_), y[v], residual[v]);
      } else {
        for (int v = 0; v < V; ++v) y[v] = residual[v] + y[v];
      }
    }
    for (int v = 0; v < V; ++v) Out::store(out_ + at + apart_ * v, lanes_, y[v]);
  }

 private:
  Lanes lanes_;
  int64_t apart_, stride_, N_;
  uint32_t image_;
  bool silu_;
  const float *x_scale_, *gate_;
  const T* residual_;
  T* out_;
  Vec scale_[V], bias_[V];
};

}  // namespace
}  // namespace sana
