// cross_attention for AVX-512: bf16 in pairs (VDPBF16PS), the rest in float.
#include "common/avx512.h"

#include "cross_attention/cross_attention_vector.h"

namespace sana {

using Pairs = OnVectors<Pair>;

const CrossAttentionKernels cross_attention_avx512 = {packed_bytes_any<Pairs>, pack_any<Pairs>, attend_any<Pairs>};

}  // namespace sana
