// Adaptive layer norm and gated residual: the C++ interface. The arithmetic is specified in
// sana_kernels/modulate/reference.py.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

// One row of C elements per image: (B, C) with stride 1 along C.
struct ImageRows {
  const void* data;
  int64_t stride;
  DType dtype;
};

// (B, N, C) of the op's dtype: strides in elements of B and N; the stride of C is 1.
struct TokenRows {
  const void* data;
  int64_t stride[2];
};

// out = LayerNorm(x) * (1 + scale) + shift: (B, N, C) contiguous, of `dtype` where `row_scale` is null; else int8 rows
// of quantized_pitch(C) values (gemm/quantize.h), and `row_scale` gets one float per token.
struct Modulate {
  TokenRows x;
  ImageRows shift, scale;
  void* out;
  int64_t B, N, C;
  DType dtype;
  float eps;
  float* row_scale = nullptr;
};

// out = x + gate * y; out (B, N, C) contiguous.
struct GateResidual {
  TokenRows x, y;
  ImageRows gate;
  void* out;
  int64_t B, N, C;
  DType dtype;
};

Status modulate_cpu(const Modulate& p, int threads);
Status gate_residual_cpu(const GateResidual& p, int threads);

}  // namespace sana
