// cross_attention for AVX2: in float, whatever the dtype.
#include "common/avx2.h"

#include "cross_attention/cross_attention_vector.h"

namespace sana {

const CrossAttentionKernels cross_attention_avx2 = {packed_bytes_any<Widened>, pack_any<Widened>, attend_any<Widened>};

}  // namespace sana
