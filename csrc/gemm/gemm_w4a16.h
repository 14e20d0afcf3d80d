// Matrix product with 4-bit weights on CPUs: the C++ interface. The arithmetic is specified in
// sana_kernels/gemm/int4_reference.py, the weights in sana_kernels/quant/formats.py.
#pragma once

#include <stdint.h>

#include "gemm/gemm.h"

namespace sana {

// x        M rows of K elements of x_dtype
// values   N rows of groups * group nibbles, that of even k in the low half of a byte; zero beyond K
// scale    N rows of `groups` floats; the group is a multiple of 64
struct GemmW4A16 {
  Gemm gemm;  // all but weight, and without scales: N and K may be any number
  DType x_dtype;
  const uint8_t* values;
  const float* scale;
  int64_t groups, group;
};

Status gemm_w4a16_cpu(const GemmW4A16& p, int threads);

}  // namespace sana
