// cross_attention for AVX-512: bf16 in pairs (VDPBF16PS), the rest in float.
#include "common/avx512.h"

#include "cross_attention/cross_attention_vector.h"

namespace sana {
namespace {

// A step of two bf16.
struct Pair : PairStep {
  static constexpr int kChain = kKeys;

  // Half the size of the scores that they replace, from the first on: nothing is overwritten before it is read.
  static void store_probabilities(int32_t* row, int64_t l, Vec p) {
    BF16::store(reinterpret_cast<uint16_t*>(row) + l, kAllLanes, p);
  }
  template <class E>
  static void load_row(const uint16_t* x, int64_t D, int32_t* row) {
    memcpy(row, x, D * sizeof *x);
  }
  template <class E>
  static Vector pack_values(const uint16_t* const (&tokens)[2], int64_t d, Lanes lanes) {
    return interleave(_mm256_maskz_loadu_epi16(lanes, tokens[0] + d), _mm256_maskz_loadu_epi16(lanes, tokens[1] + d));
  }
};

}  // namespace

const CrossAttentionKernels cross_attention_avx512 = {packed_bytes_any<Pair>, pack_any<Pair>, attend_any<Pair>};

}  // namespace sana
