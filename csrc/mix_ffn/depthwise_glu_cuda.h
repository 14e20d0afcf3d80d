// The middle of SANA's Mix-FFN on NVIDIA GPUs: the C++ interface.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

// h (B, height * width, 2F), out (B, height * width, F) of `dtype`, contiguous; weight (2F, 1, 3, 3) and bias (2F),
// contiguous, in `dtype` or float.
struct DepthwiseGluArgs {
  const void *h, *weight, *bias;
  void* out;
  int64_t B, height, width, F;
  DType dtype, weight_dtype, bias_dtype;
};

Status depthwise_glu_cuda(const DepthwiseGluArgs& p, void* stream);

}  // namespace sana
