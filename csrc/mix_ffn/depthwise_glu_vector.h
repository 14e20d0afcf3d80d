// A row of depthwise_glu on vectors of channels; include common/avx512.h or common/avx2.h first. depthwise_glu.cpp has
// the algorithm.
//
// A vector of channels slides along a segment of the row: each column of three inputs is loaded once and feeds three
// outputs, whose sums stay in registers beside the nine taps. First the values, then the gates, which takes 15
// registers at a time. Neighbouring tokens are thousands of bytes apart, which no hardware prefetcher follows: every
// load also prefetches what the same token needs four cache lines later (2.7 times as fast where h comes from the last
// cache).
#pragma once

#include "gemm/quantize_vector.h"
#include "mix_ffn/depthwise_glu_cpu.h"

namespace sana {
namespace {

constexpr int64_t kPrefetchBytes = 256;

// From token to token along a segment of a row of `width`: load(x) brings a column, which add(sum, j) adds as the j-th of
// the three that an output sees. emit(x, sum) for x = first ... last - 1.
template <class Sum, class Load, class Add, class Emit>
inline __attribute__((always_inline)) void slide(int64_t width, int64_t first, int64_t last, Sum bias, Load load, Add add,
                                                 Emit emit) {
  Sum before = bias, here = bias;  // the sums of tokens x - 1 and x
  if (first > 0) {
    load(first - 1);
    here = add(here, 0);
  }
  for (int64_t x = first; x < last; ++x) {
    load(x);
    if (x > first) emit(x - 1, add(before, 2));
    before = add(here, 1);
    here = add(bias, 0);
  }
  if (last < width) {
    load(last);
    before = add(before, 2);
  }
  emit(last - 1, before);
}

// emit(x, sum) for the tokens x = first ... last - 1, where `sum` are the convolution's channels c, c + 1, ...
// Of the rows of taps, [kFirst, kLast) take part: at the upper and lower edge of the image one is missing.
template <class E, int kFirst, int kLast, class Emit>
inline __attribute__((always_inline)) void convolve(const DepthwiseGluRow& row, int64_t c, Lanes lanes, int64_t first,
                                                    int64_t last, Emit emit) {
  using T = typename E::Type;
  const int64_t channels = 2 * row.F;
  Vec tap[3][3], column[3];
  for (int i = kFirst; i < kLast; ++i)
    for (int j = 0; j < 3; ++j) tap[i][j] = F32::load(row.filter.taps + (3 * i + j) * channels + c, lanes);
  const Vec bias = F32::load(row.filter.taps + 9 * channels + c, lanes);

  const bool new_line = c * sizeof(T) % 64 == 0;
  const auto load = [&](int64_t x) {
    for (int i = kFirst; i < kLast; ++i) {
      const T* h = static_cast<const T*>(row.h[i]) + x * row.pitch + c;
      column[i] = E::load(h, lanes);
      if (new_line) _mm_prefetch(reinterpret_cast<const char*>(h) + kPrefetchBytes, _MM_HINT_T0);
    }
  };
  // The column as the j-th of the three that an output sees. Summed apart first: that rounds less than one long chain.
  const auto add = [&](Vec sum, int j) {
    if (kLast - kFirst == 1) return fmadd(column[kFirst], tap[kFirst][j], sum);
    Vec part = column[kFirst] * tap[kFirst][j];
    for (int i = kFirst + 1; i < kLast; ++i) part = fmadd(column[i], tap[i][j], part);
    return sum + part;
  };

  slide(row.width, first, last, bias, load, add, emit);
}

// A segment: emit(x, c, lanes, u) for its results.
template <class E, int kFirst, int kLast>
struct Single {
  using Element = E;

  template <class Gate, class Emit>
  static void run(const DepthwiseGluRow& row, int64_t first, int64_t last, Gate gate, Emit emit) {
    for_vectors(row.F, [&](int64_t c, Lanes lanes) __attribute__((always_inline)) {  // so that full lanes are a constant
      Vec value[kGluSegment];
      convolve<E, kFirst, kLast>(row, c, lanes, first, last, [&](int64_t x, Vec sum) { value[x - first] = sum; });
      convolve<E, kFirst, kLast>(row, row.F + c, lanes, first, last,
                                 [&](int64_t x, Vec sum) { emit(x, c, lanes, value[x - first] * gate(sum)); });
    });
  }
};

template <class Segment>
void segment_floating(const DepthwiseGluRow& row, int64_t first, int64_t last) {
  using E = typename Segment::Element;
  using T = typename E::Type;
  T* const out = static_cast<T*>(row.out);
  const int64_t F = row.F;
  Segment::run(
      row, first, last, [](Vec x) { return sizeof(T) == 4 ? silu(x) : silu_16(x); },
      [=](int64_t x, int64_t c, Lanes lanes, Vec u) { E::store(out + x * F + c, lanes, u); });
}

template <class Segment>
void segment_quantized(const DepthwiseGluRow& row, int64_t first, int64_t last) {
  const int64_t F = row.F, pitch = quantized_pitch(F);
  Vec largest[kGluSegment];
  for (Vec& x : largest) x = set1(0);
  Segment::run(
      row, first, last, [](Vec x) { return silu_16(x); },
      [&](int64_t x, int64_t c, Lanes lanes, Vec u) {
        largest[x - first] = magnitude_max(largest[x - first], u);
        F32::store(row.scratch + (x - first) * F + c, lanes, u);
      });
  for (int64_t x = first; x < last; ++x) {
    const RowScale scale = row_scale(largest_magnitude(largest[x - first]));
    const float* u = row.scratch + (x - first) * F;
    store_quantized_row(F, scale, static_cast<int8_t*>(row.out) + x * pitch,
                        [&](int64_t c, Lanes lanes) { return F32::load(u + c, lanes); });
    row.scale[x] = scale.scale;
  }
}

template <class Segment>
void segments(const DepthwiseGluRow& row) {
  const auto segment = row.scale == nullptr ? segment_floating<Segment> : segment_quantized<Segment>;
  for (int64_t first = 0; first < row.width; first += kGluSegment)
    segment(row, first, first + kGluSegment < row.width ? first + kGluSegment : row.width);
}

template <class E>
void glu_row(const DepthwiseGluRow& row) {
  const bool above = row.h[0] != nullptr, below = row.h[2] != nullptr;
  if (above && below) return segments<Single<E, 0, 3>>(row);
  if (above) return segments<Single<E, 0, 2>>(row);
  if (below) return segments<Single<E, 1, 3>>(row);
  segments<Single<E, 1, 2>>(row);
}

void glu_row_any(const DepthwiseGluRow& row) {
  if (row.dtype == DType::f32) return glu_row<F32>(row);
  if (row.dtype == DType::f16) return glu_row<F16>(row);
  glu_row<BF16>(row);
}

}  // namespace
}  // namespace sana
