// The rows of an op's result on CPUs: in a float type where they belong, or on through the cache to int8, which is what the
// next matrix product reads. Only for files without an instruction set in their name.
#pragma once

#include "common/scratch.h"
#include "gemm/quantize.h"

namespace sana {

// out: contiguous rows of C elements of `dtype`; where there is a `scale`, of quantized_pitch(C) int8, and it gets one
// float per row.
struct ResultRows {
  void* out;
  float* scale;
  int64_t C;
  DType dtype;

  // make(rows) writes `count` contiguous rows of C elements of `dtype`, which become rows first ... first + count - 1,
  // in the calling thread. False where there is no memory.
  template <class F>
  bool write(int64_t first, int64_t count, F make) const {
    if (scale == nullptr) {
      make(at(out, first * C, dtype));
      return true;
    }
    static thread_local Scratch scratch;
    char* const rows = scratch.reserve(count * C * element_size(dtype));
    if (rows == nullptr) return false;
    make(rows);
    int8_t* const values = static_cast<int8_t*>(out) + first * quantized_pitch(C);
    return quantize_cpu({rows, values, scale + first, count, C, C, dtype}, 1) == Status::ok;
  }
};

}  // namespace sana
