// depthwise_glu for AVX-512: of bf16 32 channels at a time, in one of two ways. Both take channels in the order in which
// they come out of a register: the filter is put into it once, u back at the end.
//
//   Pairs   two products in one instruction, VDPBF16PS, of taps in bf16: a pair is what the rows above and at a token have
//           in a channel; the row below is paired with zero. Interleaving the halves of every 128 bits of two rows takes one
//           instruction for 16 pairs. For 16 sums of a column 6 products and 2 interleavings
//   Floats  even and odd channels, widened by a shift and by a mask: 9 products and 3 of those (where a vector of 16
//           channels, widened by itself, takes 12, 3 and 3 loads that shuffle)
//
// Floats is for processors without VDPBF16PS, and for those with tiles, which are Intel's: there it is four operations, two
// on either of the ports that multiply, so 32 sums of a column take 28 cycles in pairs and 12 in floats, by LLVM's model of
// Sapphire Rapids. On AMD it is one, and pairs are faster (bench/notes/cpu_engine.md).
#include "common/avx512.h"

#include "common/steps.h"
#include "mix_ffn/depthwise_glu_vector.h"

namespace sana {
namespace {

struct Two {
  Vec low, high;
};

#if defined(__AVX512BF16__)
struct Pairs {
  __m512i of[4];  // the rows above and here (low, high), the row below

  // Where channel k is: the unit of `low`, or 16 + that of `high`.
  static constexpr int unit(int k) { return k / 4 % 2 * 16 + k / 8 * 4 + k % 4; }

  Pairs(__m512i above, __m512i here, __m512i below) {
    const __m512i zero = _mm512_setzero_si512();
    of[0] = _mm512_unpacklo_epi16(above, here), of[1] = _mm512_unpackhi_epi16(above, here);
    of[2] = _mm512_unpacklo_epi16(below, zero), of[3] = _mm512_unpackhi_epi16(below, zero);
  }

  static constexpr int64_t kTaps = 4;  // vectors of a column's taps
  Two add_to(Two sum, const Vec* tap) const {
    const auto madd = [&](Vec s, int i) { return PairStep::madd(s, of[i], _mm512_castps_si512(tap[i])); };
    return {madd(madd(sum.low, 0), 2), madd(madd(sum.high, 1), 3)};
  }

  // A channel's taps of one column, in float, to where they belong in a column's vectors.
  static void arrange(float above, float here, float below, int unit, float* to) {
    to[unit] = float_from_bits(bits_from_float(above) >> 16 | (bits_from_float(here) & 0xffff0000));
    to[32 + unit] = float_from_bits(bits_from_float(below) >> 16);
  }
};
#endif

struct Floats {
  Vec of[3][2];  // by row: even and odd channels

  static constexpr int unit(int k) { return k % 2 * 16 + k / 2; }

  Floats(__m512i above, __m512i here, __m512i below) {
    const __m512i rows[3] = {above, here, below};
    for (int i = 0; i < 3; ++i)
      for (int odd = 0; odd < 2; ++odd) of[i][odd] = bf16_of_two(_mm512_castsi512_ps(rows[i]), odd);
  }

  static constexpr int64_t kTaps = 6;
  Two add_to(Two sum, const Vec* tap) const {
    for (int i = 0; i < 3; ++i) sum = {fmadd(of[i][0], tap[2 * i], sum.low), fmadd(of[i][1], tap[2 * i + 1], sum.high)};
    return sum;
  }

  static void arrange(float above, float here, float below, int unit, float* to) {
    to[unit] = above, to[32 + unit] = here, to[64 + unit] = below;
  }
};

// What is arranged for 32 channels: the vectors of three columns, then the bias, low and high.
template <class Column>
void arrange(const float* filter, int64_t rows, float* to) {
  constexpr int64_t kColumn = Column::kTaps * kLanes;
  for (int k = 0; k < kArrangedChannels; ++k) {
    const auto tap = [&](int i, int j) { return filter[(3 * i + j) * rows + k]; };
    for (int j = 0; j < 3; ++j) Column::arrange(tap(0, j), tap(1, j), tap(2, j), Column::unit(k), to + j * kColumn);
    to[3 * kColumn + Column::unit(k)] = tap(3, 0);
  }
}

// A segment, as `Single`.
template <class Column>
struct Arranged {
  using Element = BF16;

  template <class Gate, class Emit>
  static void run(const DepthwiseGluRow& row, int64_t first, int64_t last, Gate gate, Emit emit) {
    alignas(64) int32_t order[32];
    for (int k = 0; k < 32; ++k) order[k] = Column::unit(k);
    const __m512i lower = _mm512_load_si512(order), upper = _mm512_load_si512(order + 16);
    for (int64_t c = 0; c < row.F; c += kArrangedChannels) {
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
    constexpr int64_t kTaps = Column::kTaps;
    const float* const filter = row.filter.arranged + c / kArrangedChannels * kArrangedFloats;
    Vec vector[3 * kTaps + 2];
    for (int64_t i = 0; i < 3 * kTaps + 2; ++i) vector[i] = F32::load(filter + i * kLanes, kAllLanes);
    const Two bias = {vector[3 * kTaps], vector[3 * kTaps + 1]};

    const auto load_row = [&](int i, int64_t x) {
      if (row.h[i] == nullptr) return _mm512_setzero_si512();
      const uint16_t* const h = static_cast<const uint16_t*>(row.h[i]) + x * row.pitch + c;
      _mm_prefetch(reinterpret_cast<const char*>(h) + kPrefetchBytes, _MM_HINT_T0);
      return _mm512_loadu_si512(h);
    };
    Column column(_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512());
    const auto load = [&](int64_t x) { column = Column(load_row(0, x), load_row(1, x), load_row(2, x)); };
    // The column as the j-th of the three that an output sees.
    const auto add = [&](Two sum, int j) { return column.add_to(sum, vector + kTaps * j); };

    slide(row.width, first, last, bias, load, add, emit);
  }
};

template <class Column>
void row(const DepthwiseGluRow& row) {
  if (row.filter.arranged != nullptr) return segments<Arranged<Column>>(row);
  glu_row_any(row);
}

}  // namespace

#if defined(__AVX512BF16__)
const DepthwiseGluKernels depthwise_glu_avx512 = {row<Pairs>, arrange<Pairs>, true};
const DepthwiseGluKernels depthwise_glu_amx = {row<Floats>, arrange<Floats>, false};
#else
const DepthwiseGluKernels depthwise_glu_avx512vnni = {row<Floats>, arrange<Floats>, false};
#endif

}  // namespace sana
