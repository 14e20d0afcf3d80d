// The middle of SANA's Mix-FFN on NVIDIA GPUs: the C++ interface.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

// h (B, height * width, 2F), out (B, height * width, F) of `dtype`, contiguous; bias (2F), contiguous, and weight (2F, 9)
// of any strides, in `dtype` or float.
struct DepthwiseGluArgs {
  const void *h, *weight, *bias;
  void* out;
  int64_t B, height, width, F;
  int64_t weight_channel, weight_tap;  // strides: 9 and 1 as checkpoints have it, 1 and 2F tap by tap
  DType dtype, weight_dtype, bias_dtype;
};

Status depthwise_glu_cuda(const DepthwiseGluArgs& p, void* stream);

}  // namespace sana
