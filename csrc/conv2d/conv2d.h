// The DC-AE's convolutions, with what stands around them: the C++ interface. The arithmetic is specified in
// sana_kernels/conv2d/reference.py.
#pragma once

#include <stdint.h>

#include "conv2d/rms_norm.h"

namespace sana {

struct NormWeights {
  const float *weight, *bias;  // null: no norm
};

// Consecutive rows of images, in one piece (B, count, width, C) or in two: of a single image the first rows may lie
// elsewhere, where its last band left them.
struct Rows {
  const void* above;  // (1, above_count, width, C), or null
  int64_t above_count;
  const void* rest;
  int64_t count;

  // The row `row` of an image, of `bytes`, counted from the first that is held.
  const char* at(int64_t image, int64_t row, int64_t bytes) const {
    if (row < above_count) return static_cast<const char*>(above) + row * bytes;
    return static_cast<const char*>(rest) + (image * count + row - above_count) * bytes;
  }
  // Are all rows from `first` to `last` in one piece?
  bool together(int64_t first, int64_t last) const { return (first < above_count) == (last < above_count); }
};

// Rows of an image of `height`: x holds those from `start` on; the result has rows first ... last - 1.
struct Band {
  int64_t start, first, last, height;
};

// A 3 x 3 convolution, zero-padded by a pixel:
//
//     phases 1: out = RMSNorm(activation(conv(input_activation(RMSNorm(x))) + bias)) + residual, stride 1 or 2
//     phases 4: the pixels 2h + dy, 2w + dx of out = conv_phase(x) + bias + shortcut of x, phase 2 dy + dx, of 2 x 2
//               taps (a folded upsampling) or 3 x 3; first and last of the band are rows of x
//
// weight: packed as pack_conv2d says (sana_kernels/conv2d/weights.py), of x's dtype (f32 or bf16) or int8. Where it is
// `transformed` (stride 1), it holds kernel x kernel positions of a 3 x 3 kernel's transform, int8 or int16, with a scale
// for each position and column: of phases 1 by F(4x4, 3x3) (kernel 6), of phases 4 by the upsampling's (3); in int8, what
// sums start with stands before each chunk (sana_kernels/conv2d/transforms.py).

struct Conv2d {
  Rows x;                     // of `dtype`
  const void* weight;         // phases or positions x N rounded up to 16 columns x kernel rows of taps, or one
  const float* weight_scale;  // phases or positions * N floats beside integer weights; else null
  const float* bias;          // N floats, or phases * N, or null
  Rows residual;              // like out; `rest` is null where there is none
  void* out;                  // phases 1: (B, last - first, width / stride, N), rounded up; 4: twice as many, each way
  int64_t B, width, C, N;
  Band band;
  int stride, kernel, phases;
  bool transformed;
  int weight_bytes;  // of an integer of the weight
  bool bias_by_phase;
  NormWeights input_norm, norm;
  Activation input_activation, activation;
  float eps;
  DType dtype;
};

Status conv2d_cpu(const Conv2d& p, int threads);

// A depthwise k x k convolution, zero-padded, and a 1 x 1 convolution in groups of D channels. x (B, rows, width, C),
// depthwise: (k * k, C), grouped: (C / D, D in, D out), the last two floats; out: (B, last - first, width, C).
struct MultiScale {
  const void* x;
  const float *depthwise, *grouped;
  void* out;
  int64_t B, rows, width, C, D, kernel;
  Band band;
  DType dtype;
};

Status multi_scale_cpu(const MultiScale& p, int threads);

}  // namespace sana
