// depthwise_glu for AVX-512.
#include "common/avx512.h"

#include "mix_ffn/depthwise_glu_vector.h"

namespace sana {

const DepthwiseGluKernels depthwise_glu_avx512 = {glu_row_any};

}  // namespace sana
