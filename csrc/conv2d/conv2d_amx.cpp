// The DC-AE's convolutions on AMX tiles, in int8 and bf16: 32 pixels, the width of a tile of the result, by 32 columns.
//
// A row of taps is 3 C elements of consecutive pixels, so an operand tile is 16 rows of 64 bytes, a pixel apart: what
// 32 pixels see of one row is 34 C elements, 35 KB at C = 512 in bf16. As many rows of taps at a time as the
// first-level cache holds (in bf16 three at C = 128, two at 256), the sums waiting in the second-level cache for the next;
// all of them where a chunk is one block of columns (in bf16 from C = 512 on), since no second block would reuse the x that
// is kept. The weights of a chunk lie in the second-level cache for all rows of the group: products take 32 bytes per cycle.
// Where not all weights stay there, those of the next chunk are fetched meanwhile: its first row alone would wait for them.
//
// Tile products run beside vector instructions: the epilogue of a group is spread over the products of the next, a
// pixel at a time. Gathering is not, but what the next tile sees is fetched into the second-level cache meanwhile.
//
// Pixels beyond the image's right end are computed too: the window and the sums have room for 32.
#include "common/avx512.h"
#include "common/tiles.h"
#include "conv2d/conv2d_tiles.h"
#include "gemm/multiply_amx.h"

namespace sana {
namespace {

constexpr int64_t kFirstLevel = 36 << 10;  // bytes of x, leaving room for weights and sums
// Bytes of weights, of a second-level cache of 2 MB with window and sums: what stays, else of a chunk, beside the next.
constexpr int64_t kStay = 600 << 10, kChunk = 320 << 10;

// What a step of the products does besides: fetching the next tile and chunk and, every so many, the epilogue of a pixel.
template <class Pending>
struct Beside {
  Pending& pending;
  const int64_t lines, every, lines_of_weights;
  const char *weight = nullptr, *end = nullptr;
  int64_t left = every;

  void run(int) {
    pending.next_tile.run(lines);
    for (int64_t i = 0; i < lines_of_weights && weight < end; ++i, weight += 64) __builtin_prefetch(weight, 0, 2);
    if (--left > 0) return;
    left = every;
    if (pending.left() > 0) pending.pixel();
  }
};

template <class T>
struct Multiply {
  static Vec load(const float* sums) { return T::load(reinterpret_cast<const typename T::Sum*>(sums)); }

  // Rows of taps `first` to `last` - 1 of a row of pixels, the columns of two panels.
  template <class B>
  static void block(const Products& q, int64_t row, int64_t panel, int64_t first, int64_t last, B& beside) {
    const Layout& l = q.layout;
    const int64_t stride = sizeof(float) * l.sums;
    const int64_t second = panel + 1 < q.panels ? l.panel : 0;  // of the last panel alone, a copy
    float* sums = q.to(row, 0) + 16 * panel;
    first == 0 ? zero_sums() : load_sums(sums, stride);
    for (int64_t i = first; i < last; ++i)
      multiply<T>(q.x(row, 0) + i * l.row, q.stride * l.pixel, q.weight + panel * l.panel + i * 16 * l.packed, second,
                  l.packed / 64, beside);
    store_sums(sums, stride);
  }

  template <class Pending>
  static void multiply_all(const Products& q, Pending& pending) {
    const Layout& l = q.layout;
    const int64_t seen = q.stride * kTilePixels * l.pixel;  // of a row of taps
    const bool stay = q.weight_bytes <= kStay;
    const int64_t chunk = stay ? (q.panels + 1) / 2 * 2 : kChunk / l.panel < 2 ? 2 : kChunk / l.panel / 2 * 2;
    const int64_t fitting = chunk == 2 ? q.kernel : seen > kFirstLevel ? 1 : kFirstLevel / seen;
    const int64_t steps = q.rows * q.kernel * (l.packed / 64) * ((q.panels + 1) / 2), left = pending.left();
    const int64_t lines = ceil_div(pending.next_tile.lines_left(), steps);
    const int64_t lines_of_weights = stay ? 0 : (32 + q.rows - 1) / q.rows;  // a step of a row multiplies 32
    Beside<Pending> beside = {pending, lines, left == 0 || steps < left ? 1 : steps / left, lines_of_weights};
    configure_tiles();
    for (int64_t begin = 0; begin < q.panels; begin += chunk) {
      const int64_t end = begin + chunk < q.panels ? begin + chunk : q.panels;
      const int64_t left = end < q.panels ? q.panels - end : q.panels;
      beside.weight = end < q.panels ? q.weight + end * l.panel : q.next;
      beside.end = beside.weight + (left < chunk ? left : chunk) * l.panel;
      for (int64_t row = 0; row < q.rows; ++row)
        for (int64_t first = 0; first < q.kernel; first += fitting) {
          const int64_t last = first + fitting < q.kernel ? first + fitting : q.kernel;
          for (int64_t panel = begin; panel < end; panel += 2) block(q, row, panel, first, last, beside);
        }
    }
    _tile_release();
  }
};

void tiles(const Conv2d& p, const Layout& layout, const Tile& tiles, char* memory) {
  tiles_narrow<Multiply, BFloat16, Int8>(p, layout, tiles, memory);
}

}  // namespace

const Conv2dKernels conv2d_amx = {0, 0, 2, 1 << 19, tiles};

}  // namespace sana
