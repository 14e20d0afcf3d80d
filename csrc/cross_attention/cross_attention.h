// Softmax attention of image tokens to text tokens: the C++ interface. The arithmetic is specified in
// sana_kernels/cross_attention/reference.py.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

// q: (B, N, H, D); k, v: (B, L, H, D); all of `dtype`, strides in elements of B, N or L, and H; the stride of D is 1.
// out: (B, N, H, D), contiguous; where there is a `row_scale`, (B, N) rows of quantized_pitch(H * D) int8
// (gemm/quantize.h), and it gets one float per row. lengths: B numbers of text tokens from 1 to L, or null for all; what lies beyond them
// is never read.
struct CrossAttention {
  const void *q, *k, *v;
  void* out;
  const int64_t* lengths;
  int64_t B, N, L, H, D;
  int64_t q_stride[3], k_stride[3], v_stride[3];
  DType dtype;
  float* row_scale;
};

static inline int64_t length_of(const CrossAttention& p, int64_t b) {
  return p.lengths == nullptr ? p.L : p.lengths[b];
}

Status cross_attention_cpu(const CrossAttention& p, int threads);

}  // namespace sana
