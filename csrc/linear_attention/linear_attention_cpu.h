// What one instruction set contributes to the CPU kernel: its inner loops. linear_attention.cpp splits the work,
// owns the memory and calls them; see there for the algorithm.
#pragma once

#include "common/integers.h"
#include "linear_attention/linear_attention.h"

namespace sana {

// A head's state: D + 1 rows of `pitch` floats, pitch = D rounded up to 16; lanes beyond D are zero.
//     row e < D   sum_n relu(k[n][e]) * v[n][:]
//     row D       sum_n relu(k[n][:])
// An image's state: its H heads one after another.
static inline int64_t state_pitch(const LinearAttention& p) { return round_up(p.D, 16); }
static inline int64_t head_state_floats(const LinearAttention& p) { return (p.D + 1) * state_pitch(p); }

struct LinearAttentionKernels {
  // state = the state of tokens first ... last - 1 of image b. `weight`: k's norm as (H, pitch) floats, or null.
  void (*state)(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, float* state);
  // Rearranges a head's state, the sum of all tokens, for apply; null where there is nothing to do.
  void (*finish)(const LinearAttention& p, float* head_state);
  // The result for these tokens, as rows of H * D elements. `weight`: q's norm, likewise.
  void (*apply)(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last,
                const float* state, void* out);
};

extern const LinearAttentionKernels linear_attention_portable;
extern const LinearAttentionKernels linear_attention_avx2;
extern const LinearAttentionKernels linear_attention_avx512vnni;
extern const LinearAttentionKernels linear_attention_avx512;
extern const LinearAttentionKernels linear_attention_amx;

}  // namespace sana
