// ReLU linear attention: the C++ interface. The arithmetic is specified in sana_kernels/linear_attention/reference.py.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

// q, k, v: (B, N, H, D) of `dtype`, strides in elements of B, N and H; the stride of D is 1. out: the same, contiguous;
// where there is a `row_scale` (CPUs only), (B, N) rows of quantized_pitch(H * D) int8 (gemm/quantize.h), and it gets
// one float per row.
// q_norm, k_norm: (H * D) weights, or null for no normalisation.
struct LinearAttention {
  const void *q, *k, *v;
  void* out;
  int64_t B, N, H, D;
  int64_t q_stride[3], k_stride[3], v_stride[3];
  DType dtype;
  const void *q_norm, *k_norm;
  DType q_norm_dtype, k_norm_dtype;
  float norm_eps, eps;
  float* row_scale;
};

static inline Status check(const LinearAttention& p) {
  if (p.B < 1 || p.N < 1 || p.H < 1 || p.D < 1) return Status::bad_shape;
  if (p.D % 8 != 0 || p.D > 128) return Status::bad_head_dim;
  if (!valid(p.dtype) || !valid(p.q_norm_dtype) || !valid(p.k_norm_dtype)) return Status::bad_dtype;
  return Status::ok;
}

Status linear_attention_cpu(const LinearAttention& p, int threads);

// `scratch`: device memory of as many floats as linear_attention_cuda_scratch says. `stream`: a cudaStream_t.
int64_t linear_attention_cuda_scratch(const LinearAttention& p);
Status linear_attention_cuda(const LinearAttention& p, float* scratch, void* stream);

}  // namespace sana
