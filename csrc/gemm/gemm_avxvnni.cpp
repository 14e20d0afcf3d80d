// Matrix product for AVX-VNNI.
#include "gemm/gemm_avx2.h"

namespace sana {

const GemmKernels gemm_avxvnni = {BFloat16::kRows, kPanel, 4, kBuffer, block};

}  // namespace sana
