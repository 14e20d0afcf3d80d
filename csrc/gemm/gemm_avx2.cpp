// Matrix product for AVX2.
#include "gemm/gemm_avx2.h"

namespace sana {

const GemmKernels gemm_avx2 = {BFloat16::kRows, kPanel, 4, kBuffer, block};

}  // namespace sana
