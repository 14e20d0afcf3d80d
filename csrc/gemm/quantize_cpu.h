// What one instruction set contributes to `quantize` on CPUs: a loop over rows. quantize.cpp splits the work.
#pragma once

#include "gemm/quantize.h"

namespace sana {

struct QuantizeKernels {
  void (*rows)(const Quantize& p, int64_t first, int64_t last);
};

extern const QuantizeKernels quantize_portable;
extern const QuantizeKernels quantize_avx2;
extern const QuantizeKernels quantize_avx512vnni;
extern const QuantizeKernels quantize_avx512;

}  // namespace sana
