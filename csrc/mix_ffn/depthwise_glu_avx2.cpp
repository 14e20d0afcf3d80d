// depthwise_glu for AVX2.
#include "common/avx2.h"

#include "mix_ffn/depthwise_glu_vector.h"

namespace sana {

const DepthwiseGluKernels depthwise_glu_avx2 = {glu_row_any, nullptr, false};

}  // namespace sana
