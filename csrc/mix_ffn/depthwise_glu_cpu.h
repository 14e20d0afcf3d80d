// What one instruction set contributes to depthwise_glu on CPUs: a row of tokens. depthwise_glu.cpp has the algorithm.
#pragma once

#include "mix_ffn/depthwise_glu.h"

namespace sana {

// Tokens that are computed at a time: their F floats stay in the L2 cache until they are quantised.
constexpr int64_t kGluSegment = 16;

// Pairs of taps, for blocks of 32 channels: for each of the three columns 16 pairs of the taps above and here of half the
// channels, those of the other half, and the taps below (paired with zero) of both; then the bias of both, in float.
constexpr int64_t kPairChannels = 32, kPairVectors = 14;  // of 16 units of 32 bits

// The channel of a block that unit i of half `half` belongs to: halves of 128 bits alternate.
constexpr int64_t pair_channel(int64_t half, int64_t i) { return i / 4 * 8 + half * 4 + i % 4; }

struct DepthwiseGluKernels {
  void (*row)(const DepthwiseGluRow& row);
  bool pairs;  // wanted
};

extern const DepthwiseGluKernels depthwise_glu_portable;
extern const DepthwiseGluKernels depthwise_glu_avx2;
extern const DepthwiseGluKernels depthwise_glu_avx512;

}  // namespace sana
