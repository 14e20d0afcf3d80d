// The arguments of linear_attention as Python passes them, for both binding modules: addresses, sizes, strides, dtypes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <utility>

#include "linear_attention/linear_attention.h"

namespace sana {

using Address = uintptr_t;
using NormWeight = std::optional<std::pair<Address, int>>;  // address and dtype, or None

inline LinearAttention linear_attention_args(const std::array<Address, 4>& qkv_out, const std::array<int64_t, 4>& shape,
                                             const std::array<std::array<int64_t, 3>, 3>& strides, int dtype,
                                             const std::array<NormWeight, 2>& norms, float norm_eps, float eps) {
  const auto pointer = [](Address address) { return reinterpret_cast<void*>(address); };
  LinearAttention p = {};
  p.q = pointer(qkv_out[0]);
  p.k = pointer(qkv_out[1]);
  p.v = pointer(qkv_out[2]);
  p.out = pointer(qkv_out[3]);
  p.B = shape[0];
  p.N = shape[1];
  p.H = shape[2];
  p.D = shape[3];
  for (int i = 0; i < 3; ++i) {
    p.q_stride[i] = strides[0][i];
    p.k_stride[i] = strides[1][i];
    p.v_stride[i] = strides[2][i];
  }
  p.dtype = DType(dtype);
  if (norms[0]) p.q_norm = pointer(norms[0]->first), p.q_norm_dtype = DType(norms[0]->second);
  if (norms[1]) p.k_norm = pointer(norms[1]->first), p.k_norm_dtype = DType(norms[1]->second);
  p.norm_eps = norm_eps;
  p.eps = eps;
  return p;
}

}  // namespace sana
