// 8-bit rows for matrix products: the C++ interface of `quantize`, and what its instruction sets share. The arithmetic
// is specified, to the bit, in sana_kernels/gemm/reference.py.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/integers.h"
#include "common/status.h"

namespace sana {

// x: `rows` rows of K elements of `dtype`, `stride` elements apart. values: contiguous rows of quantized_pitch(K) int8,
// zero beyond K; scale: one float per row.
struct Quantize {
  const void* x;
  int8_t* values;
  float* scale;
  int64_t rows, K, stride;
  DType dtype;
};

Status quantize_cpu(const Quantize& p, int threads);

static inline int64_t quantized_pitch(int64_t K) { return round_up(K, 64); }

// What turns values into steps, and back, for a row whose largest magnitude is given: `most` steps. A NaN comes out as
// one.
struct RowScale {
  float scale, inverse;
};

static inline RowScale row_scale(float largest, float most = 127) {
  if (largest < 0x1p-100f) return {0, 0};
  return {largest / most, most / largest};
}

}  // namespace sana
