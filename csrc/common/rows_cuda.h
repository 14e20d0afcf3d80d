// Rows of 8-bit values as the CUDA kernels write them: the C++ interface. sana_kernels/gemm/reference.py specifies
// them.
#pragma once

#include <stdint.h>

namespace sana {

constexpr int64_t kMaxRow = 10 * 1024;  // values; a block keeps a row in the registers of 640 threads

struct QuantizedRows {
  void* values;   // (rows, width) int8 or fp8 (e4m3), null for none
  float* scale;   // (rows)
  int64_t width;  // a multiple of 64; values beyond the row's end are 0
  bool fp8;
};

}  // namespace sana
