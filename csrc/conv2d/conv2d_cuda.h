// What stands around the convolutions of the DC-AE decoder, on NVIDIA GPUs: the C++ interface. The arithmetic is
// specified in sana_kernels/conv2d/reference.py.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

enum class Activation : int { none = 0, silu = 1, relu = 2 };  // ACTIVATIONS of sana_kernels/conv2d/reference.py

// out = activation(x / RMS(x) * weight + bias) + residual; x, residual (or null), out: (rows, C), weight, bias (C).
struct RmsNorm {
  const void *x, *weight, *bias, *residual;
  void* out;
  int64_t rows, C;
  DType dtype;  // of everything
  Activation activation;
  float eps;
};

// phases (B, H + 1, W + 1, 4 C), x (B, H, W, 4 C / repeats) -> out (B, 2H, 2W, C); bias (C).
struct UpsampleShuffle {
  const void *phases, *x, *bias;
  void* out;
  int64_t B, H, W, C, repeats;  // C a multiple of 8, repeats 2 or 4, addresses multiples of 16
  DType dtype;
};

Status rms_norm_cuda(const RmsNorm& p, void* stream);
Status upsample_shuffle_cuda(const UpsampleShuffle& p, void* stream);

}  // namespace sana
