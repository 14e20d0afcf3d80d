// RMSNorm over the channels of a pixel, with activation and residual: the C++ interface. The arithmetic is specified in
// sana_kernels/conv2d/reference.py.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

enum class Activation : int { none = 0, silu = 1, relu = 2 };  // ACTIVATIONS of sana_kernels/conv2d/reference.py

// out = activation(x / RMS(x) * weight + bias) + residual; x, residual (or null), out: (rows, C), weight, bias (C). On
// GPUs weight may be null, which leaves out the norm, bias too, and out may be x.
struct RmsNorm {
  const void *x, *weight, *bias, *residual;
  void* out;
  int64_t rows, C;
  DType dtype;  // of everything; on CPUs, weight and bias are float
  Activation activation;
  float eps;
};

Status rms_norm_cpu(const RmsNorm& p, int threads);

}  // namespace sana
