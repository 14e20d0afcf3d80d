// The inner loops of ReLU linear attention for AVX-512.
#include "common/avx512.h"

#include "linear_attention/linear_attention_vector.h"

namespace sana {

const LinearAttentionKernels SANA_AVX512_NAME(linear_attention) = {state_any<StepOf16>, nullptr, apply_any};

}  // namespace sana
