// rms_norm and multi_scale on vectors of channels; include common/avx512.h, avx2.h or portable.h first. pixels.cpp has
// the algorithm.
#pragma once

#include "conv2d/norm_vector.h"

namespace sana {
namespace {

template <class E>
void rms_norm_rows(const RmsNorm& p, int64_t first, int64_t last) {
  using T = typename E::Type;
  const NormWeights norm = {static_cast<const float*>(p.weight), static_cast<const float*>(p.bias)};
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.C;
    const T* residual = p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + row * p.C;
    T* out = static_cast<T*>(p.out) + row * p.C;
    normalize(p.C, norm, p.eps, [&](int64_t c, Lanes lanes) { return E::load(x + c, lanes); },
              [&](int64_t c, Lanes lanes, Vec y) {
                y = activate<E>(p.activation, y);
                E::store(out + c, lanes, residual == nullptr ? y : y + E::load(residual + c, lanes));
              });
  }
}

inline void rms_norm_any(const RmsNorm& p, int64_t first, int64_t last) {
  if (p.dtype == DType::f32) return rms_norm_rows<F32>(p, first, last);
  if (p.dtype == DType::f16) return rms_norm_rows<F16>(p, first, last);
  rms_norm_rows<BF16>(p, first, last);
}

// kTilePixels pixels of a row, or fewer, group by group.
template <class E>
void multi_scale_pixels(const MultiScale& p, int64_t image, int64_t row, int64_t first, int64_t last, float* memory) {
  using T = typename E::Type;
  const int64_t reach = p.kernel / 2, C = p.C, D = p.D;
  const int64_t top = row - reach < 0 ? 0 : row - reach;
  const int64_t bottom = row + reach < p.band.height ? row + reach : p.band.height - 1;
  for (int64_t group = 0; group < C; group += D) {
    for (int64_t pixel = first; pixel < last; ++pixel) {
      const int64_t left = pixel - reach < 0 ? 0 : pixel - reach;
      const int64_t right = pixel + reach < p.width ? pixel + reach : p.width - 1;
      for_vectors(D, [&](int64_t c, Lanes lanes) {
        Vec sum = set1(0);
        for (int64_t y = top; y <= bottom; ++y) {
          const T* x = static_cast<const T*>(p.x) + ((image * p.rows + y - p.band.start) * p.width) * C + group + c;
          const float* taps = p.depthwise + ((y - row + reach) * p.kernel - pixel + reach) * C + group + c;
          Vec part = set1(0);  // summed apart first: that rounds less than one long chain
          for (int64_t i = left; i <= right; ++i)
            part = fmadd(E::load(x + i * C, lanes), F32::load(taps + i * C, lanes), part);
          sum = sum + part;
        }
        F32::store(memory + (pixel - first) * D + c, lanes, sum);
      });
    }
    const float* weight = p.grouped + group * D;
    for (int64_t pixel = first; pixel < last; ++pixel) {
      const float* y = memory + (pixel - first) * D;
      const int64_t index = ((image * (p.band.last - p.band.first) + row - p.band.first) * p.width + pixel) * C + group;
      for_vectors(D, [&](int64_t c, Lanes lanes) {
        Vec sums[4] = {set1(0), set1(0), set1(0), set1(0)};
        const auto add = [&](int64_t d, Vec& s) { s = fmadd(set1(y[d]), F32::load(weight + d * D + c, lanes), s); };
        int64_t d = 0;
        for (; d + 4 <= D; d += 4)
          for (int i = 0; i < 4; ++i) add(d + i, sums[i]);
        for (; d < D; ++d) add(d, sums[0]);
        E::store(static_cast<T*>(p.out) + index + c, lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
      });
    }
  }
}

inline void multi_scale_row(const MultiScale& p, int64_t image, int64_t row, float* memory) {
  for (int64_t first = 0; first < p.width; first += kTilePixels) {
    const int64_t last = first + kTilePixels < p.width ? first + kTilePixels : p.width;
    p.dtype == DType::f32 ? multi_scale_pixels<F32>(p, image, row, first, last, memory)
                          : multi_scale_pixels<BF16>(p, image, row, first, last, memory);
  }
}

}  // namespace
}  // namespace sana
