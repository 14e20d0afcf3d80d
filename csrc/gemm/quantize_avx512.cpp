// quantize for AVX-512.
#include "common/avx512.h"

#include "gemm/quantize_vector.h"

namespace sana {

const QuantizeKernels quantize_avx512 = {quantize_rows_any};

}  // namespace sana
