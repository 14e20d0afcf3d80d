// The inner loops of cross_attention in plain C++, for any processor, and to read before the faster ones.
// cross_attention.cpp has the algorithm; here a block is one text token.
#include <math.h>

#include "cross_attention/cross_attention_cpu.h"

namespace sana {
namespace {

constexpr int64_t kMaxD = 128;

// (length, D) floats of k, then of v.
int64_t packed_bytes(const CrossAttention& p) { return round_up(2 * p.L * p.D * int64_t(sizeof(float)), 64); }

void pack(const CrossAttention& p, int64_t b, int64_t h, void* packed) {
  float* keys = static_cast<float*>(packed);
  float* values = keys + p.L * p.D;
  for (int64_t l = 0; l < length_of(p, b); ++l) {
    const int64_t k = b * p.k_stride[0] + l * p.k_stride[1] + h * p.k_stride[2];
    const int64_t v = b * p.v_stride[0] + l * p.v_stride[1] + h * p.v_stride[2];
    load_row(at(p.k, k, p.dtype), p.dtype, p.D, keys + l * p.D);
    load_row(at(p.v, v, p.dtype), p.dtype, p.D, values + l * p.D);
  }
}

void attend(const CrossAttention& p, int64_t b, int64_t h, int64_t first, int64_t last, const void* packed, void* rows) {
  const float* keys = static_cast<const float*>(packed);
  const float* values = keys + p.L * p.D;
  const float scale = 1 / sqrtf(float(p.D));
  for (int64_t n = first; n < last; ++n) {
    float q[kMaxD], y[kMaxD] = {}, largest = -INFINITY, sum = 0;
    load_row(at(p.q, b * p.q_stride[0] + n * p.q_stride[1] + h * p.q_stride[2], p.dtype), p.dtype, p.D, q);
    for (int64_t l = 0; l < length_of(p, b); ++l) {
      const float* k = keys + l * p.D;
      const float* v = values + l * p.D;
      float parts[8] = {}, score = 0;  // a vector's worth of sums: D is a multiple of 8
      for (int64_t d = 0; d < p.D; d += 8)
        for (int i = 0; i < 8; ++i) parts[i] += q[d + i] * k[d + i];
      for (float part : parts) score += part;
      score *= scale;
      const float before = largest;
      largest = score > before ? score : before;
      const float factor = expf(before - largest), probability = expf(score - largest);
      sum = sum * factor + probability;
      for (int64_t d = 0; d < p.D; ++d) y[d] = y[d] * factor + probability * v[d];
    }
    for (int64_t d = 0; d < p.D; ++d) y[d] /= sum;
    store_row(y, p.dtype, p.D, at(rows, ((n - first) * p.H + h) * p.D, p.dtype));
  }
}

}  // namespace

const CrossAttentionKernels cross_attention_portable = {packed_bytes, pack, attend};

}  // namespace sana
