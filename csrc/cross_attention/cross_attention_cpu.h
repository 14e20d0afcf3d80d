// What one instruction set contributes to cross_attention on CPUs. cross_attention.cpp has the algorithm.
#pragma once

#include "common/integers.h"
#include "cross_attention/cross_attention.h"

namespace sana {

struct CrossAttentionKernels {
  // Bytes of `packed` for each head of each image, a multiple of 64.
  int64_t (*packed_bytes)(const CrossAttention& p);
  // The text tokens of a head, in the layout that attend reads.
  void (*pack)(const CrossAttention& p, int64_t b, int64_t h, void* packed);
  // The outputs of a head's tokens first ... last - 1, in their rows of H * D elements.
  void (*attend)(const CrossAttention& p, int64_t b, int64_t h, int64_t first, int64_t last, const void* packed,
                 void* rows);
};

extern const CrossAttentionKernels cross_attention_portable;
extern const CrossAttentionKernels cross_attention_avx2;
extern const CrossAttentionKernels cross_attention_avx512vnni;
extern const CrossAttentionKernels cross_attention_avx512;
extern const CrossAttentionKernels cross_attention_amx;  // of bf16

}  // namespace sana
