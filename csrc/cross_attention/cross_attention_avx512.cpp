// cross_attention for AVX-512: bf16 in pairs (VDPBF16PS) where the processor has them, the rest in float.
#include "common/avx512.h"

#include "cross_attention/cross_attention_vector.h"

namespace sana {

#if defined(__AVX512BF16__)
using Best = OnVectors<Pair>;
#else
using Best = Widened;
#endif

const CrossAttentionKernels SANA_AVX512_NAME(cross_attention) = {packed_bytes_any<Best>, pack_any<Best>,
                                                                 attend_any<Best>};

}  // namespace sana
