// quantize for AVX2.
#include "common/avx2.h"

#include "gemm/quantize_vector.h"

namespace sana {

const QuantizeKernels quantize_avx2 = {quantize_rows_any};

}  // namespace sana
