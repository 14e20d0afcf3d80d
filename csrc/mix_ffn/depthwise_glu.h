// The middle of SANA's Mix-FFN, a depthwise 3x3 convolution and a gated linear unit: the C++ interface. The arithmetic
// is specified in sana_kernels/mix_ffn/reference.py (depthwise_glu, depthwise_glu_quantized).
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

// The whole op. h: (B, height * width, 2F) of `dtype`, contiguous; weight (2F, 9); bias (2F).
// out: (B, height * width, F) of `dtype` where `scale` is null; else int8 rows of `quantized_pitch(F)` values, zero
// beyond F, and `scale` gets one float per token.
struct DepthwiseGlu {
  const void *h, *weight, *bias;
  void* out;
  float* scale;
  int64_t B, height, width, F;
  DType dtype, weight_dtype, bias_dtype;
};

Status depthwise_glu_cpu(const DepthwiseGlu& p, int threads);

struct DepthwiseGluKernels;

// A filter made ready by the instruction set that will apply it.
struct DepthwiseFilter {
  const float* taps;      // 10 rows of 2F: the taps (above left, above, above right, left, ...), then the bias
  const float* arranged;  // the same in the order of that instruction set's vectors, or null where it has none
  const DepthwiseGluKernels* kernels;
};

// One row of tokens of one image, for callers that make h band by band.
struct DepthwiseGluRow {
  const void* h[3];  // the rows above, at and below it: `width` tokens of 2F elements; null above or below the image
  int64_t pitch;     // elements from token to token of h
  DepthwiseFilter filter;  // of an h of `dtype`
  void* out;               // `width` tokens, as in DepthwiseGlu; so is `scale`
  float* scale;
  float* scratch;  // depthwise_glu_scratch(F) floats of this thread, where `scale` is not null
  int64_t width, F;
  DType dtype;
};

void depthwise_glu_row(const DepthwiseGluRow& row);
int64_t depthwise_glu_scratch(int64_t F);

// The filter of a DepthwiseGlu, of which weight, bias, their dtypes, F and h's dtype are read, in `memory` of
// depthwise_filter_floats(F) floats.
DepthwiseFilter pack_depthwise(const DepthwiseGlu& p, float* memory, int threads);
int64_t depthwise_filter_floats(int64_t F);

}  // namespace sana
