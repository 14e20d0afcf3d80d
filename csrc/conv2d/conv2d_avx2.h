// The DC-AE's convolutions on vectors of 8 columns, for AVX2 and for AVX-VNNI, which differ in how they multiply int8:
// what a group of pixels sees and, one by one, panels of 16 columns are brought into the form that the inner loop reads
// (gemm/multiply_avx2.h), and all pixels of the group pass each panel.
#pragma once

#include "common/avx2.h"
#include "conv2d/conv2d_tiles.h"
#include "gemm/multiply_avx2.h"

namespace sana {
namespace {

template <>
constexpr int64_t kPart<Float> = 64;
template <>
constexpr int64_t kStart<Int8Chunks> = kStartBytes;

template <class T, int R>
inline __attribute__((always_inline)) void clear(typename T::Sum (&sum)[R][T::kSums]) {
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < T::kSums; ++i) sum[r][i] = T::zero();
}

template <class T>
struct Multiply {
  static Vec load(const float* sums) { return _mm256_loadu_ps(sums); }

  // R pixels of a panel from column n on; `window` is q's, widened.
  template <int R>
  static void block(const Products& q, const char* window, const char* panel, int64_t n, int64_t row, int64_t pixel,
                    const Corrections<T>& corrections) {
    using Multiplied = typename T::Multiplied;
    constexpr int64_t kTimes = T::kTimes;
    const Layout& l = q.layout;
    const char* const seen = window + kTimes * (q.x(row, pixel) - q.window);
    float* const to = q.to(row, pixel) + n;
    typename T::Sum sum[R][T::kSums];
    if constexpr (kPart<T> == 0) clear<T>(sum);
    for_parts<T>(q, [&](int64_t x, int64_t k, int64_t bytes) __attribute__((always_inline)) {
      const char* const part = panel + k / 4 * T::kBytes;
      if constexpr (kStart<T> != 0)
        for (int r = 0; r < R; ++r) T::start(sum[r], part);
      else if constexpr (kPart<T> != 0) clear<T>(sum);
      if constexpr (kQuarters<T> && R == 1) {
        static_assert(kTimes == 1, "quarters are of x as it is");
        Vec chain[4][1][2] = {};
        for_quarters(bytes, [&](int64_t i, int64_t from, int64_t some) __attribute__((always_inline)) {
          multiply<Multiplied>(chain[i], seen + x + from, 0, part + from / 4 * T::kBytes, some);
        });
        for (int half = 0; half < 2; ++half)
          sum[0][half] = (chain[0][0][half] + chain[1][0][half]) + (chain[2][0][half] + chain[3][0][half]);
      } else {
        multiply<Multiplied>(sum, seen + kTimes * x, kTimes * q.stride * l.pixel, part + kStart<T> / 4 * T::kBytes,
                             kTimes * bytes);
      }
      if constexpr (kPart<T> != 0) {  // the sums of parts are in memory: the registers are full
        const float* const scale = T::kScaled ? q.chunk_scale(pixel, x) : nullptr;
        for (int r = 0; r < R; ++r)
          for (int half = 0; half < 2; ++half) {
            float* const at = to + r * l.sums + 8 * half;
            const Vec before = k == 0 ? set1(0) : _mm256_loadu_ps(at);
            _mm256_storeu_ps(at, T::add(before, sum[r], half, T::kScaled ? scale[r] : 1));
          }
      }
    });
    if constexpr (kPart<T> == 0)
      for (int r = 0; r < R; ++r)
        for (int half = 0; half < 2; ++half)
          _mm256_storeu_ps(to + r * l.sums + 8 * half, T::result(sum[r], half, corrections.of[row][pixel + r]));
  }

  template <class Pending>
  static void multiply_all(const Products& q, Pending&) {
    const Corrections<T> corrections(q);
    const int64_t K = q.layout.panel / 16;
    const char* window = q.window;
    if constexpr (T::kTimes > 1) {
      char* const widened = q.buffer + kScratch * K;
      T::widen(window, q.x(q.rows - 1, q.pixels - 1) + (q.kernel - 1) * q.layout.row + q.bytes - window, widened);
      window = widened;
    }
    for (int64_t p = 0; p < q.panels; ++p) {
      const char* panel = T::panel(q.weight + p * q.layout.panel, K, q.buffer);
      for (int64_t row = 0; row < q.rows; ++row) {
        int64_t i = 0;
        for (; i + T::kRows <= q.pixels; i += T::kRows) block<T::kRows>(q, window, panel, 16 * p, row, i, corrections);
        for (; i < q.pixels; ++i) block<1>(q, window, panel, 16 * p, row, i, corrections);
      }
    }
  }
};

void tiles(const Conv2d& p, const Layout& layout, const Tile& tiles, char* memory) {
  tiles_any<Multiply, Float, BFloat16, Int8, Int8Chunks, Int16Chunks>(p, layout, tiles, memory);
}

}  // namespace
}  // namespace sana
