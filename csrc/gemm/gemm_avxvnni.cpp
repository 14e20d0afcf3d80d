// Matrix product for AVX-VNNI. Register block in int8: 6 rows x 2 vectors.
#include "gemm/gemm_avx2.h"

namespace sana {

const GemmKernels gemm_avxvnni = {Int8::kRows, kPanel, 4, kScratch, block};

}  // namespace sana
