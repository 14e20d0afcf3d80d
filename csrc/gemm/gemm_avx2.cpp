// Matrix product for AVX2. Register block in int8: 3 rows x 4 vectors, each vector half sums of 4 columns.
#include "gemm/gemm_avx2.h"

namespace sana {

const GemmKernels gemm_avx2 = {BFloat16::kRows, kPanel, 4, kScratch, block};

}  // namespace sana
