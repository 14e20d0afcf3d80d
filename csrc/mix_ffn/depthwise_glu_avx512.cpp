// depthwise_glu for AVX-512: of bf16 with taps in bf16, two products in one instruction (VDPBF16PS).
//
// A pair is what the rows above and at a token have in a channel; the row below is paired with zero. Interleaving the
// halves of every 128 bits of two rows of 32 channels takes one instruction for 16 pairs, and no widening: for 16 sums of
// a column 6 products and 2 interleavings, where floats take 12 and 3 loads that widen. The sums are then in the order of
// such halves (pair_channel), as are the taps and the bias from the start, until u is put in order.
#include "common/avx512.h"

#include "common/steps.h"
#include "mix_ffn/depthwise_glu_vector.h"

namespace sana {
namespace {

struct Pairs {
  using Element = BF16;
  struct Two {
    Vec low, high;
  };

  template <class Gate, class Emit>
  static void run(const DepthwiseGluRow& row, int64_t first, int64_t last, Gate gate, Emit emit) {
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    for (int64_t c = 0; c < row.F; c += kPairChannels) {
      Two value[kGluSegment];
      convolve(row, c, first, last, [&](int64_t x, Two sum) { value[x - first] = sum; });
      convolve(row, row.F + c, first, last, [&](int64_t x, Two sum) {
        const Vec low = value[x - first].low * gate(sum.low), high = value[x - first].high * gate(sum.high);
        emit(x, c, kAllLanes, _mm512_permutex2var_ps(low, lower, high));
        emit(x, c + kLanes, kAllLanes, _mm512_permutex2var_ps(low, upper, high));
      });
    }
  }

 private:
  // emit(x, sums) for the tokens x = first ... last - 1, in the channels c ... c + 31.
  template <class Emit>
  static inline __attribute__((always_inline)) void convolve(const DepthwiseGluRow& row, int64_t c, int64_t first,
                                                             int64_t last, Emit emit) {
    const float* const filter = row.pairs + c / kPairChannels * kPairVectors * kLanes;
    const auto vector = [&](int i) { return F32::load(filter + i * kLanes, kAllLanes); };
    __m512i tap[3][4], column[4];  // of three columns: pairs of the rows above and here (low, high), of the row below
    for (int j = 0; j < 3; ++j)
      for (int i = 0; i < 4; ++i) tap[j][i] = _mm512_castps_si512(vector(4 * j + i));
    const Two bias = {vector(12), vector(13)};

    const auto load_row = [&](int i, int64_t x) {
      if (row.h[i] == nullptr) return _mm512_setzero_si512();
      const uint16_t* const h = static_cast<const uint16_t*>(row.h[i]) + x * row.pitch + c;
      _mm_prefetch(reinterpret_cast<const char*>(h) + kPrefetchBytes, _MM_HINT_T0);
      return _mm512_loadu_si512(h);
    };
    const auto load = [&](int64_t x) {
      const __m512i above = load_row(0, x), here = load_row(1, x), below = load_row(2, x), zero = _mm512_setzero_si512();
      column[0] = _mm512_unpacklo_epi16(above, here);
      column[1] = _mm512_unpackhi_epi16(above, here);
      column[2] = _mm512_unpacklo_epi16(below, zero);
      column[3] = _mm512_unpackhi_epi16(below, zero);
    };
    // The column as the j-th of the three that an output sees.
    const auto add = [&](Two sum, int j) {
      const Vec low = PairStep::madd(sum.low, column[0], tap[j][0]), high = PairStep::madd(sum.high, column[1], tap[j][1]);
      return Two{PairStep::madd(low, column[2], tap[j][2]), PairStep::madd(high, column[3], tap[j][3])};
    };

    slide(row.width, first, last, bias, load, add, emit);
  }
};

void row(const DepthwiseGluRow& row) {
  if (row.pairs != nullptr && row.dtype == DType::bf16) return segments<Pairs>(row);
  glu_row_any(row);
}

}  // namespace

const DepthwiseGluKernels depthwise_glu_avx512 = {row, true};

}  // namespace sana
