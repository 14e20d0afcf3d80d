// The arguments of linear_attention as Python passes them, for both binding modules: addresses, sizes, strides, dtypes.
#pragma once

#include <array>

#include "common/bind.h"
#include "linear_attention/linear_attention.h"

namespace sana {

inline LinearAttention linear_attention_args(const std::array<Address, 4>& qkv_out, const std::array<int64_t, 4>& shape,
                                             const std::array<std::array<int64_t, 3>, 3>& strides, int dtype,
                                             const std::array<Typed, 2>& norms, float norm_eps, float eps) {
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
