// What one instruction set contributes to depthwise_glu on CPUs: a row of tokens. depthwise_glu.cpp has the algorithm.
#pragma once

#include "mix_ffn/depthwise_glu.h"

namespace sana {

// Tokens that are computed at a time: their F floats stay in the L2 cache until they are quantised.
constexpr int64_t kGluSegment = 16;

// Blocks of the filter that an instruction set may want arranged, and at most how many floats each becomes.
constexpr int64_t kArrangedChannels = 32, kArrangedFloats = 20 * 16;

struct DepthwiseGluKernels {
  void (*row)(const DepthwiseGluRow& row);
  // A block of the filter, whose 10 rows lie `rows` apart; null: as it is.
  void (*arrange)(const float* filter, int64_t rows, float* to);
  bool bf16_taps;  // arranged only if they are of bf16
};

extern const DepthwiseGluKernels depthwise_glu_portable;
extern const DepthwiseGluKernels depthwise_glu_avx2;
extern const DepthwiseGluKernels depthwise_glu_avx512vnni;
extern const DepthwiseGluKernels depthwise_glu_avx512;
extern const DepthwiseGluKernels depthwise_glu_amx;  // no tiles: what is faster where there are some

}  // namespace sana
