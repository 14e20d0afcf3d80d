// The DC-AE's convolutions in plain C++, for any processor: one pixel by 16 columns at a time.
#include <type_traits>

#include "common/portable.h"
#include "conv2d/conv2d_tiles.h"
#include "gemm/multiply_portable.h"

namespace sana {
namespace {

template <>
constexpr int64_t kPart<Float> = 64;
template <>
constexpr int64_t kStart<Int8Chunks> = kStartBytes;

template <class T>
struct Multiply {
  using Element = typename T::Element;

  static Vec load(const float* sums) { return *sums; }

  template <class Pending>
  static void multiply_all(const Products& q, Pending&) {
    const Layout& l = q.layout;
    for (int64_t panel = 0; panel < q.panels; ++panel)
      for (int64_t row = 0; row < q.rows; ++row)
        for (int64_t pixel = 0; pixel < q.pixels; ++pixel) {
          typename std::conditional<T::kScaled, float, typename T::Sum>::type sum[kColumns] = {};
          for_parts<T>(q, [&](int64_t x, int64_t k, int64_t bytes) {
            typename T::Sum part[kColumns] = {};
            const auto* const seen = reinterpret_cast<const Element*>(q.x(row, pixel) + x);
            const auto* const weight =
                reinterpret_cast<const Element*>(q.weight + panel * l.panel + 16 * (k + kStart<T>));
            if constexpr (kQuarters<T>) {
              float chain[4][kColumns] = {};
              for_quarters(bytes, [&](int64_t i, int64_t from, int64_t some) {
                multiply<T>(chain[i], seen + from / 4, weight + 4 * from, some / 4);
              });
              for (int i = 0; i < kColumns; ++i) part[i] = (chain[0][i] + chain[1][i]) + (chain[2][i] + chain[3][i]);
            } else {
              multiply<T>(part, seen, weight, bytes / int64_t(sizeof(Element)));
            }
            const float* const scale = T::kScaled ? q.chunk_scale(pixel, x) : nullptr;
            for (int i = 0; i < kColumns; ++i)
              if constexpr (T::kScaled) sum[i] += part[i] * *scale;
              else sum[i] += part[i];
          });
          for (int i = 0; i < kColumns; ++i) q.to(row, pixel)[panel * kColumns + i] = float(sum[i]);
        }
  }
};

void tiles(const Conv2d& p, const Layout& layout, const Tile& tiles, char* memory) {
  tiles_any<Multiply, Float, BFloat16, Int8, Int8Chunks, Int16Chunks>(p, layout, tiles, memory);
}

}  // namespace

const Conv2dKernels conv2d_portable = {0, 0, 1, 1 << 18, tiles};

}  // namespace sana
