// A row of depthwise_glu in plain C++, for any processor. depthwise_glu.cpp has the algorithm.
#include <math.h>
#include <string.h>

#include "gemm/quantize_portable.h"
#include "mix_ffn/depthwise_glu_cpu.h"

namespace sana {
namespace {

constexpr int64_t kPart = 64;  // channels at a time

// out = the convolution's channels c ... c + count - 1 at token x. Summed in double: without fused multiply-adds,
// floats would be rounded twice as often as in the other kernels.
void convolve(const DepthwiseGluRow& row, int64_t x, int64_t c, int64_t count, float* out) {
  const int64_t channels = 2 * row.F;
  const float* bias = row.filter.taps + 9 * channels + c;
  double sum[kPart];
  for (int64_t k = 0; k < count; ++k) sum[k] = bias[k];
  for (int64_t i = 0; i < 3; ++i) {
    for (int64_t j = 0; j < 3; ++j) {
      const int64_t column = x + j - 1;
      if (row.h[i] == nullptr || column < 0 || column >= row.width) continue;
      const float* tap = row.filter.taps + (3 * i + j) * channels + c;
      float h[kPart];
      load_row(at(row.h[i], column * row.pitch + c, row.dtype), row.dtype, count, h);
      for (int64_t k = 0; k < count; ++k) sum[k] += double(tap[k]) * h[k];
    }
  }
  for (int64_t k = 0; k < count; ++k) out[k] = float(sum[k]);
}

void glu_row(const DepthwiseGluRow& row) {
  const int64_t F = row.F;
  for (int64_t x = 0; x < row.width; ++x) {
    for (int64_t c = 0; c < F; c += kPart) {
      const int64_t count = F - c < kPart ? F - c : kPart;
      float value[kPart], gate[kPart];
      convolve(row, x, c, count, value);
      convolve(row, x, F + c, count, gate);
      for (int64_t k = 0; k < count; ++k) value[k] *= gate[k] / (1 + expf(-gate[k]));
      if (row.scale != nullptr)
        memcpy(row.scratch + c, value, count * sizeof *value);
      else
        store_row(value, row.dtype, count, at(row.out, x * F + c, row.dtype));
    }
    if (row.scale != nullptr)
      row.scale[x] = quantize_row(row.scratch, F, static_cast<int8_t*>(row.out) + x * quantized_pitch(F));
  }
}

}  // namespace

const DepthwiseGluKernels depthwise_glu_portable = {glu_row, nullptr, false};

}  // namespace sana
