// The DC-AE's convolutions on AMX tiles, in int8 and bf16: 32 pixels, the width of a tile of the result, by 32 columns.
//
// A row of taps is 3 C elements of consecutive pixels, so an operand tile is 16 rows of 64 bytes, a pixel apart: what 32
// pixels see of one row is (34 C) elements, 35 KB at C = 512 in bf16. As many rows of taps at a time as the first-level
// cache holds (three at C = 128, one from C = 256 on); the sums of all columns wait in memory for the next.
//
// Pixels beyond the image's right end are computed too: the window and the sums have room for 32.
#include "common/avx512.h"
#include "common/tiles.h"
#include "conv2d/conv2d_vector.h"
#include "gemm/multiply_amx.h"

namespace sana {
namespace {

constexpr int64_t kFirstLevel = 36 << 10;  // bytes of x, leaving room for weights and sums

struct NothingPending {
  void run(int) {}
};

template <class T>
struct Multiply {
  static Vec load(const float* sums) { return T::load(reinterpret_cast<const typename T::Sum*>(sums)); }

  static void multiply_all(const Products& q) {
    const Layout& l = q.layout;
    const int64_t seen = q.stride * kTilePixels * l.pixel, stride = sizeof(float) * l.sums;
    const int64_t fitting = kFirstLevel / seen < 1 ? 1 : kFirstLevel / seen;
    NothingPending nothing;
    configure_tiles();
    for (int64_t row = 0; row < q.rows; ++row)
      for (int64_t first = 0; first < q.kernel; first += fitting) {
        const int64_t last = first + fitting < q.kernel ? first + fitting : q.kernel;
        for (int64_t panel = 0; panel < q.panels; panel += 2) {
          const bool whole = panel + 2 <= q.panels;  // else the second half is a copy of the first
          float* sums = q.to(row, 0) + 16 * panel;
          first == 0 ? zero_sums() : load_sums(sums, stride);
          for (int64_t i = first; i < last; ++i)
            multiply<T>(q.x(row, 0) + i * l.row, q.stride * l.pixel, q.weight + panel * l.panel + i * 16 * l.packed,
                        whole ? l.panel : 0, l.packed / 64, nothing);
          store_sums(sums, stride);
        }
      }
    _tile_release();
  }
};

void tile(const Conv2d& p, const Tile& tile, char* memory) { tile_narrow<Multiply, BFloat16, Int8>(p, tile, memory); }

}  // namespace

const Conv2dKernels conv2d_amx = {0, tile};

}  // namespace sana
