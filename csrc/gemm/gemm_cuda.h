// Matrix products and the rows that they take, on NVIDIA GPUs: the C++ interface.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/rows_cuda.h"
#include "common/status.h"

namespace sana {

// rows of K elements of `dtype`, `stride` elements apart, to 8 bits (sana_kernels/gemm/reference.py).
struct Quantize {
  const void* x;
  int64_t rows, K, stride;
  DType dtype;
};

Status quantize_cuda(const Quantize& p, const QuantizedRows& out, void* stream);

struct Values {
  const void* data;  // null: none
  DType dtype;
};

// out[m][n] = residual[m][n] + gate[m / image][n] * SiLU(sum * x_scale[m] * weight_scale[n] + bias[n]), in float.
struct Epilogue {
  const float *x_scale, *weight_scale;  // both or neither
  Values bias;                          // (N)
  Values gate;                          // (images, N), rows gate_stride apart; only with a residual
  int64_t gate_stride;
  Values residual;  // (images, rows of one image, N)
  int64_t residual_stride[2];
  void* out;    // (M, N)
  DType dtype;  // of out
  bool silu;
  bool vectors;         // everything can be read and written eight values at a time
  int64_t M, N, image;  // image: rows of one image
};

// x (M, K), weight (N, K) int8, contiguous, K a multiple of 64, both at multiples of 16 bytes. `tile`: an index into
// TILES of sana_kernels/gemm/cuda.py.
struct GemmW8A8 {
  const void *x, *weight;
  int64_t K;
  int tile;
  Epilogue epilogue;
};

Status gemm_w8a8_cuda(const GemmW8A8& p, void* stream);

// 4-bit rows as sana_kernels/quant/formats.py specifies them: values (rows, Kp / 2) at multiples of 16 bytes, scale
// (rows, groups), contiguous.
struct Int4Rows {
  const void* values;
  const float* scale;
  int64_t groups;  // Kp / groups values each
};

// rows of K elements of `dtype`, `stride` elements apart, divided by smooth (K) where that is not null, to groups
// of 64.
struct QuantizeInt4 {
  const void* x;
  Values smooth;
  int64_t rows, K, stride;
  DType dtype;
  void* values;
  float* scale;
};

// sums = x weight^T + low up^T: x and weight in `weight.groups` groups of 64; low (M, rank), up (N, rank) half or
// bfloat16, contiguous, at multiples of 16 bytes, the rank a multiple of 8, or null.
struct GemmW4A4 {
  Int4Rows x, weight;
  const void *low, *up;
  int64_t rank;
  DType low_dtype;
  bool large;  // tiles of 128 x 128 outputs instead of 64 x 64
  Epilogue epilogue;
};

// x (M, K) half or bfloat16, contiguous, at a multiple of 16 bytes, K a multiple of 8; weight in groups of `group`, a
// multiple of 64.
struct GemmW4A16 {
  const void* x;
  DType dtype;
  int64_t K, group;
  Int4Rows weight;
  Epilogue epilogue;
};

Status quantize_int4_cuda(const QuantizeInt4& p, void* stream);
Status gemm_w4a4_cuda(const GemmW4A4& p, void* stream);
Status gemm_w4a16_cuda(const GemmW4A16& p, void* stream);

}  // namespace sana
