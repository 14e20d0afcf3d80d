// What one instruction set contributes to depthwise_glu on CPUs: a row of tokens. depthwise_glu.cpp has the algorithm.
#pragma once

#include "mix_ffn/depthwise_glu.h"

namespace sana {

// Tokens that are computed at a time: their F floats stay in the L2 cache until they are quantised.
constexpr int64_t kGluSegment = 16;

struct DepthwiseGluKernels {
  void (*row)(const DepthwiseGluRow& row);
};

extern const DepthwiseGluKernels depthwise_glu_portable;
extern const DepthwiseGluKernels depthwise_glu_avx2;
extern const DepthwiseGluKernels depthwise_glu_avx512;

}  // namespace sana
