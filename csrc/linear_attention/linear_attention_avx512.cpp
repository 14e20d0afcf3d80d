// The inner loops of ReLU linear attention for AVX-512.
#include "common/avx512.h"

#include "linear_attention/linear_attention_vector.h"

namespace sana {

const LinearAttentionKernels linear_attention_avx512 = {state_any<PairStep>, nullptr, apply_any};

}  // namespace sana
