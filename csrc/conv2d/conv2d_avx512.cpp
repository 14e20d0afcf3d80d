// The DC-AE's convolutions for AVX-512: products of 8 pixels x 3 vectors of columns in registers, as in gemm.
//
// What 8 pixels see of 3 rows (30 KB at C = 512 in bf16) comes from the first-level cache; the weights of 48 columns
// (442 KB there) stream from the second, where they stay for all pixels of the group.
#include "common/avx512.h"
#include "conv2d/conv2d_tiles.h"
#include "gemm/multiply_avx512.h"

namespace sana {
namespace {

template <>
constexpr int64_t kPart<Float> = 64;
template <>
constexpr int64_t kStart<Int8Chunks> = kStartBytes;

template <class T>
struct Multiply {
  static Vec load(const float* sums) { return _mm512_loadu_ps(sums); }

  // R pixels and V panels.
  template <int R, int V>
  static void block(const Products& q, int64_t panel, int64_t row, int64_t pixel, const Corrections<T>& corrections) {
    const Layout& l = q.layout;
    const char* const seen = q.x(row, pixel);
    const char* const weight = q.weight + panel * l.panel;
    float* const to = q.to(row, pixel) + 16 * panel;
    const int64_t sums = l.sums;
    // A transform's weights are read in the order of memory, each by 32 patches only: a panel of the next columns comes
    // with each 8 of them.
    const char* const next = T::kScaled ? weight + (V + pixel / 8) * l.panel : nullptr;
    typename T::Sum sum[R][V] = {};
    for_parts<T>(q, [&](int64_t x, int64_t k, int64_t bytes) __attribute__((always_inline)) {
      const char* const part = weight + 16 * k;
      if constexpr (kStart<T> != 0)
        for (int v = 0; v < V; ++v) {
          const auto start = T::start(part + v * l.panel);
          for (int r = 0; r < R; ++r) sum[r][v] = start;
        }
      if constexpr (kQuarters<T> && R <= 2) {  // as many as there are registers for
        Vec chain[4][R][V] = {};
        for_quarters(bytes, [&](int64_t i, int64_t from, int64_t some) __attribute__((always_inline)) {
          multiply<T>(chain[i], seen + x + from, q.stride * l.pixel, part + 16 * from, l.panel, some);
        });
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v)
            sum[r][v] = (chain[0][r][v] + chain[1][r][v]) + (chain[2][r][v] + chain[3][r][v]);
      } else {
        multiply<T>(sum, seen + x, q.stride * l.pixel, part + 16 * kStart<T>, l.panel, bytes,
                    T::kScaled ? next + 16 * k : nullptr);
      }
      if constexpr (kPart<T> != 0) {  // the sums of parts are in memory: the registers are full
        const float* const scale = T::kScaled ? q.chunk_scale(pixel, x) : nullptr;
        const __mmask16 before = k == 0 ? 0 : 0xffff;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) {
            float* const at = to + r * sums + 16 * v;
            _mm512_storeu_ps(at, T::add(_mm512_maskz_loadu_ps(before, at), sum[r][v], T::kScaled ? scale[r] : 1));
            sum[r][v] = typename T::Sum{};
          }
      }
    });
    if constexpr (kPart<T> == 0)
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v)
          _mm512_storeu_ps(to + r * l.sums + 16 * v, T::result(sum[r][v], corrections.of[row][pixel + r]));
  }

  // V panels of all pixels.
  template <int V>
  static void columns(const Products& q, int64_t panel, const Corrections<T>& corrections) {
    for (int64_t row = 0; row < q.rows; ++row) {
      int64_t i = 0;
      if (V == 1)  // 8 sums are too few to hide the latency of a dot product
        for (; i + 16 <= q.pixels; i += 16) block<V == 1 ? 16 : 8, V>(q, panel, row, i, corrections);
      for (; i + 8 <= q.pixels; i += 8) block<8, V>(q, panel, row, i, corrections);
      if constexpr (!kQuarters<T>)
        if (q.pixels - i >= 4) block<4, V>(q, panel, row, i, corrections), i += 4;
      for (; i + 2 <= q.pixels; i += 2) block<2, V>(q, panel, row, i, corrections);
      if (i < q.pixels) block<1, V>(q, panel, row, i, corrections);
    }
  }

  template <class Pending>
  static void multiply_all(const Products& q, Pending&) {
    const Corrections<T> corrections(q);
    for (int64_t panel = 0; panel < q.panels;) {
      const int64_t left = q.panels - panel;
      if (left == 1) columns<1>(q, panel, corrections), panel += 1;
      else if (left == 2 || left == 4) columns<2>(q, panel, corrections), panel += 2;
      else columns<3>(q, panel, corrections), panel += 3;
    }
  }
};

void tiles(const Conv2d& p, const Layout& layout, const Tile& tiles, char* memory) {
  tiles_any<Multiply, Float, BFloat16, Int8, Int8Chunks, Int16Chunks>(p, layout, tiles, memory);
}

}  // namespace

const Conv2dKernels SANA_AVX512_NAME(conv2d) = {0, 0, 1, 1 << 18, tiles};

}  // namespace sana
