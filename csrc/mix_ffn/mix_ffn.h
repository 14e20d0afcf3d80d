// SANA's Mix-FFN: the C++ interface. The arithmetic is specified in sana_kernels/mix_ffn/reference.py.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

// out = residual + gate * (depthwise_glu(SiLU(x expand^T + bias)) project^T), gate and residual where asked for.
//
// x         B images of height * width rows of C elements, bf16 or int8 (then of pitch C rounded up to 64); the stride of
//           a row is in bytes, and images follow each other
// expand, project    packed as gemm/gemm.h says: (2F, C) and (C, F), both of x's type
struct MixFfn {
  const void* x;
  int64_t x_stride;
  const float* x_scale;  // B * height * width floats; null: bf16 operands
  const void* expand;
  const float* expand_scale;  // 2F floats; null: bf16 operands
  const float* expand_bias;   // 2F floats
  const void *depthwise_weight, *depthwise_bias;  // (2F, 9) and (2F)
  const void* project;
  const float* project_scale;  // C floats; null: bf16 operands
  const float* gate;           // B rows of C floats, or null
  const void* residual;        // like out, or null
  void* out;                   // B * height * width rows of C elements
  int64_t B, height, width, C, F;
  DType dtype;  // of out and residual
  DType depthwise_weight_dtype, depthwise_bias_dtype;
};

Status mix_ffn_cpu(const MixFfn& p, int threads);

}  // namespace sana
