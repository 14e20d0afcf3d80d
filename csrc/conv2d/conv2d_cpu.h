// What one instruction set contributes to the DC-AE's convolutions on CPUs: a tile of the result. conv2d.cpp has the
// algorithm and splits the work.
#pragma once

#include "common/integers.h"
#include "conv2d/conv2d.h"

namespace sana {

constexpr int64_t kTileRows = 8, kTilePixels = 32;  // TILE of sana_kernels/conv2d/reference.py

// In pixels; of phases, of one.
static inline int64_t width_of_result(const Conv2d& p) { return (p.width + p.stride - 1) / p.stride; }

// A tile of the result, of at most 8 rows x 32 pixels, or some side by side; of phases, the rows and pixels of x that
// they come of.
struct Tile {
  int64_t image, row, pixel, rows, pixels;
};

// What a tile sees lies in a buffer, with zeros beyond the image, as the operand of the products: `taps` bytes of a row
// of taps follow each other, because pixels do.
struct Layout {
  int64_t pixel;   // bytes of a pixel: C elements, padded to 4 bytes
  int64_t taps;    // bytes of a row of taps
  int64_t packed;  // the same in the weights, padded to 64 bytes with zeros
  int64_t row;     // bytes of a row of the tile
  int64_t window;  // bytes of the tile, and 64 zeros that products of 64 bytes may read
  int64_t sums;    // floats for a pixel
  int64_t panel;   // bytes of the weights of 16 columns of a phase
  int64_t group;   // rows of the result that are computed at a time
  int64_t groups;  // whose sums there is room for
  int64_t memory;  // bytes: window, sums of the groups, a pixel of x and one of the result, the products' buffer

  int64_t group_sums() const { return group * kTilePixels * sums; }
};

// The patches of a transformed kernel: each sees `seen` x `seen` pixels, `step` from those of the next, of which made x
// made results come. 32 of them are multiplied at a time, from a tile of 8 rows x `width` pixels.
struct Patches {
  int seen, step, made;
  int64_t width;

  constexpr int64_t positions() const { return seen * seen; }
  constexpr int64_t rows() const { return kTilePixels / (width / step) * step; }  // of x at a time
};

constexpr Patches patches_of(int kernel) {
  return kernel == 6 ? Patches{6, 4, 4, 64} : Patches{3, 1, 2, 32};
}

struct Conv2dKernels {
  int64_t buffer;       // bytes that the products need for each byte of K,
  int64_t window;       // and for each byte that a tile sees
  int64_t groups;       // 2 where the epilogue of one runs beside the products of the next, else 1
  int64_t group_bytes;  // of sums, about: they wait for the epilogue in the second-level cache
  void (*tiles)(const Conv2d& p, const Layout& layout, const Tile& tiles, char* memory);
};

static inline Layout layout_of(const Conv2d& p, const Conv2dKernels& kernels) {
  Layout l;
  l.pixel = round_up(p.C * (p.weight_scale == nullptr ? element_size(p.dtype) : p.weight_bytes), 4);
  l.taps = p.kernel * l.pixel;
  l.packed = round_up(l.taps, 64);
  l.row = round_up((p.stride * (kTilePixels - 1) + 3) * l.pixel, 64);
  l.window = (p.stride * (kTileRows - 1) + 3) * l.row + 64;
  l.sums = round_up(p.N, 32);
  l.panel = 16 * p.kernel * l.packed;
  l.group = kernels.group_bytes / (kTilePixels * l.sums * int64_t(sizeof(float)));
  l.group = l.group < 1 ? 1 : l.group > kTileRows ? kTileRows : l.group;
  l.groups = kernels.groups;
  const int64_t floats = l.groups * l.group_sums() + round_up(p.C, 16) + round_up(p.N, 16);
  l.memory = l.window + floats * int64_t(sizeof(float)) + kernels.buffer * l.panel / 16 +
             kernels.window * l.window;
  return l;
}

// What winograd_vector.h keeps: x as it is, the values of 32 patches, their products with some columns, sums, and the
// scales of each patch, position and chunk of channels.
constexpr int64_t kWinogradPanels = 8;
constexpr int64_t kChunkBytes = 128;  // 128 channels of int8, 64 of int16: CHUNK of sana_kernels/conv2d/transforms.py
constexpr int64_t kStartBytes = 4;    // before each chunk of int8 weights, as int32: -128 times the chunk's sum

struct WinogradLayout {
  Layout seen;      // of x, and of the sums: a group for 32 pixels side by side, or for each phase
  Layout products;  // of a position, a patch in the place of a pixel
  int64_t values;   // bytes, of all positions
  int64_t chunks;   // of channels
  int64_t memory;   // bytes, but for the products' buffer

  int64_t position_sums() const { return kTilePixels * products.sums + 16; }
};

static inline WinogradLayout winograd_layout(const Conv2d& p) {
  const Patches patches = patches_of(p.kernel);
  Conv2d as_is = p;
  as_is.weight_scale = nullptr, as_is.kernel = 3;
  WinogradLayout l = {};
  l.seen = layout_of(as_is, {0, 0, 1, 0, nullptr});
  l.seen.row = round_up((patches.width + 2) * l.seen.pixel, 64);
  l.seen.window = round_up((kTileRows + 2) * l.seen.row + 64, 64);
  l.seen.group = patches.rows();
  l.seen.groups = p.phases * patches.width / kTilePixels;
  Layout& at = l.products;
  at.pixel = at.taps = at.packed = round_up(p.C * p.weight_bytes, 64);
  at.row = kTilePixels * at.pixel + 64;  // a power of 2 would put all positions in the same lines of the first-level cache
  at.sums = 16 * kWinogradPanels;
  l.values = patches.positions() * at.row;
  l.chunks = ceil_div(at.packed, kChunkBytes);
  at.panel = 16 * (at.packed + (p.weight_bytes == 1 ? kStartBytes * l.chunks : 0));
  const int64_t floats = patches.positions() * (l.position_sums() + kTilePixels * l.chunks) +
                         l.seen.groups * l.seen.group_sums() + round_up(p.C, 16) + round_up(p.N, 16);
  l.memory = l.seen.window + l.values + floats * int64_t(sizeof(float));
  return l;
}

// The products of a group of rows: sums of 16 `panels` columns of `rows` x `pixels` pixels.
struct Products {
  const Layout& layout;
  const char* window;  // what the first pixel sees
  const char* weight;  // of the phase
  int64_t panels, rows, pixels, kernel, stride;
  int64_t bytes;  // of a row of taps that take part: layout.taps, or with the padding layout.packed
  float* sums;    // rows x 32 pixels x layout.sums
  char* buffer;   // as Conv2dKernels wants it
  const float* scale = nullptr;  // of a transform: chunks of K x 32 patches
  const char* next = nullptr;    // weights that are multiplied after these, and the bytes of all of them
  int64_t weight_bytes = 0;

  // What pixel `pixel` of row `row` sees, and where its sums go.
  const char* x(int64_t row, int64_t pixel) const {
    return window + stride * (row * layout.row + pixel * layout.pixel);
  }
  // What multiplies the sums of the patches from `pixel` on over the chunk that begins at byte x of them.
  const float* chunk_scale(int64_t pixel, int64_t x) const { return scale + x / kChunkBytes * kTilePixels + pixel; }
  float* to(int64_t row, int64_t pixel) const { return sums + (row * kTilePixels + pixel) * layout.sums; }
};

extern const Conv2dKernels conv2d_portable;
extern const Conv2dKernels conv2d_avx2;
extern const Conv2dKernels conv2d_avxvnni;
extern const Conv2dKernels conv2d_avx512vnni;
extern const Conv2dKernels conv2d_avx512;
extern const Conv2dKernels conv2d_amx;  // of int8 and bf16

// The ops beside the convolutions: some pixels of rms_norm, a row of multi_scale.
struct PixelKernels {
  void (*rms_norm)(const RmsNorm& p, int64_t first, int64_t last);
  void (*multi_scale)(const MultiScale& p, int64_t image, int64_t row, float* memory);  // of kTilePixels * D floats
};

extern const PixelKernels pixels_portable;
extern const PixelKernels pixels_avx2;
extern const PixelKernels pixels_avx512vnni;
extern const PixelKernels pixels_avx512;

}  // namespace sana
