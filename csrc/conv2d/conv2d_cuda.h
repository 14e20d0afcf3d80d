// What stands around the convolutions of the DC-AE decoder, on NVIDIA GPUs: the C++ interface. The arithmetic is
// specified in sana_kernels/conv2d/reference.py.
#pragma once

#include <stdint.h>

#include "conv2d/rms_norm.h"

namespace sana {

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
