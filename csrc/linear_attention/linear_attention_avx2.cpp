// The inner loops of ReLU linear attention for AVX2.
#include "common/avx2.h"

#include "linear_attention/linear_attention_vector.h"

namespace sana {

const LinearAttentionKernels linear_attention_avx2 = {state_any<FloatStep>, nullptr, apply_any};

}  // namespace sana
