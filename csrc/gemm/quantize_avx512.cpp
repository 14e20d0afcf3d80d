// quantize for AVX-512.
#include "common/avx512.h"

#include "gemm/quantize_vector.h"

namespace sana {

const QuantizeKernels SANA_AVX512_NAME(quantize) = {quantize_rows_any};

}  // namespace sana
