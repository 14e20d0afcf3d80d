// RMSNorm of a row, and the activations, on vectors; include common/avx512.h, avx2.h or portable.h first.
#pragma once

#include <math.h>

#include "conv2d/conv2d_cpu.h"

namespace sana {
namespace {

// For results in E's type: 16 bits need less of SiLU.
template <class E>
inline __attribute__((always_inline)) Vec activate(Activation activation, Vec y) {
  if (activation == Activation::none) return y;
  if (activation == Activation::relu) return max(set1(0), y);
  return sizeof(typename E::Type) == 4 ? silu(y) : silu_16(y);
}

// emit(c, lanes, y) for every vector of a row of C channels, y = x / RMS(x) * weight + bias and x = load(c, lanes), which
// load_again(c, lanes) returns too.
template <class Load, class LoadAgain, class Emit>
inline __attribute__((always_inline)) void normalize(int64_t C, const NormWeights& norm, float eps, Load load,
                                                     LoadAgain load_again, Emit emit) {
  constexpr int64_t kPart = 32 * kLanes;  // summed apart first: that rounds less than one long chain
  Vec squares = set1(0);
  for (int64_t first = 0; first < C; first += kPart) {
    Vec part = set1(0);
    for_vectors(C - first < kPart ? C - first : kPart, [&](int64_t c, Lanes lanes) __attribute__((always_inline)) {
      const Vec x = load(first + c, lanes);  // zero in the lanes that a last vector lacks
      part = fmadd(x, x, part);
    });
    squares = squares + part;
  }
  const Vec scale = set1(1 / sqrtf(sum(squares) / float(C) + eps));
  const float *const weight = norm.weight, *const bias = norm.bias;
  for_vectors(C, [&](int64_t c, Lanes lanes) __attribute__((always_inline)) {
    emit(c, lanes, fmadd(load_again(c, lanes) * scale, F32::load(weight + c, lanes), F32::load(bias + c, lanes)));
  });
}

template <class Load, class Emit>
inline __attribute__((always_inline)) void normalize(int64_t C, const NormWeights& norm, float eps, Load load, Emit emit) {
  normalize(C, norm, eps, load, load, emit);
}

}  // namespace
}  // namespace sana
