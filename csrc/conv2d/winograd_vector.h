// 3 x 3 convolutions with 4/9 of the multiplications: F(2x2, 3x3) of Winograd (arXiv 1509.09308), on vectors, in int8
// for W8A8 and in int16 for 16-bit floats.
//
// Algorithm (sana_kernels/conv2d/reference.py), for each tile of 8 rows x 32 pixels of the result, on one thread:
//     gather      the 10 x 34 pixels of x that the tile sees, as they are; where all of them are inside the image and in
//                 one piece, they are read in place
//     forward     every patch of 4 x 4 pixels, of which there is one for 2 x 2 results, becomes 16 values per channel. In
//                 int8 each of the 16 positions is quantised with one scale for the tile: once to know the largest
//                 values, once more to write them. In int16 a patch has a scale for every 64 channels, of the largest
//                 value in x: no transform makes more than four times of it
//     products    at each position, patches x C times C x N: a 1 x 1 convolution of Conv2dKernels, panel by panel. Of
//                 int16, 64 products fit into an int32 (the weights see to that); the sums of 64 are added as floats
//     back        of 16 sums per patch and column, in int8 times their scales, 2 x 2 results
//     epilogue    as ever
//
// Tiling: 32 patches, two rows of them, at a time: their values (16 x 32 x C bytes, 256 KB at C = 512; int16 twice
// that) and the sums of 128 columns (256 KB) stay in the second-level cache.
//
// FLOPs: 8 C N per pixel, not 18. Besides, for each pixel and vector of channels or columns, about 50 vector
// instructions for the way there and 20 for the way back. Bytes: x as conv2d.cpp; 16 C N of weights (int16: 32 C N),
// not 9, for 128 pixels, so that at C = N = 512 a core takes 4 bytes per cycle from the last cache. Bound: the multiply
// unit; of the time in int8, products are 61 % at 128 channels, 77 % at 256, 86 % at 512; in int16 they take twice as
// long, what is around them the same. Where bf16 and int8 run on AMX tiles, eight times as fast as on vectors,
// transforms would take longest: there the direct convolution is faster. Measured: bench/notes/decoder.md.
#pragma once

#include "conv2d/conv2d_vector.h"

namespace sana {
namespace {

// A transform in one dimension, of the 4 pixels that 2 results see, and back.
struct Four {
  Vec v[4];
};
inline Four forward(Vec a, Vec b, Vec c, Vec d) { return {{a - c, b + c, c - b, b - d}}; }
inline void back(const Four& m, Vec& first, Vec& second) {
  first = m.v[0] + m.v[1] + m.v[2];
  second = m.v[1] - m.v[2] - m.v[3];
}

// Pixels in rows, and how many bytes lie from one to the next.
struct Pixels {
  const char* first;
  int64_t row, pixel;
};

// f(patch, c, lanes, i, values of positions i ... i + 3) for the patches that make `rows` x `pixels` results, by rows,
// and all vectors of channels.
template <class E, class F>
inline void for_patches(const Pixels& seen, int64_t rows, int64_t pixels, int64_t C, F f) {
  using T = typename E::Type;
  const char* const window = seen.first;
  const int64_t across = (pixels + 1) / 2, below = seen.row, beside = seen.pixel;
  for (int64_t down = 0; 2 * down < rows; ++down)
    for_vectors(C, [=](int64_t c, Lanes lanes) __attribute__((always_inline)) {
      const char* x = window + 2 * down * below + c * int64_t(sizeof(T));
      const auto column = [=](const char* x) __attribute__((always_inline)) {
        const auto load = [=](int i) __attribute__((always_inline)) {
          return E::load(reinterpret_cast<const T*>(x + i * below), lanes);
        };
        return forward(load(0), load(1), load(2), load(3));
      };
      Four left = column(x), right = column(x + beside);  // of a patch; its neighbour's are the last two
      for (int64_t patch = down * across; patch < (down + 1) * across; ++patch) {
        x += 2 * beside;
        const Four third = column(x), fourth = column(x + beside);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) f(patch, c, lanes, 4 * i, forward(left.v[i], right.v[i], third.v[i], fourth.v[i]));
        left = third, right = fourth;
      }
    });
}

// What a tile sees: pixels of x, or brought together in a window, with zeros around the image.
template <class E>
Pixels seen_by(const Conv2d& p, const Layout& l, const Tile& tile, char* window, float* row) {
  using T = typename E::Type;
  const bool inside = tile.row > 0 && tile.row + kTileRows < p.band.height && tile.rows == kTileRows && tile.pixel > 0 &&
                      tile.pixel + kTilePixels < p.width && tile.pixels == kTilePixels;
  const int64_t top = tile.row - 1 - p.band.start;
  if (inside && p.input_norm.weight == nullptr && p.x.together(top, top + kTileRows + 1)) {
    const int64_t pixel = p.C * int64_t(sizeof(T)), below = p.width * pixel;
    return {p.x.at(tile.image, top, below) + (tile.pixel - 1) * pixel, below, pixel};
  }
  Conv2d as_is = p;
  as_is.weight_scale = nullptr;
  Gather<E>(as_is, l, tile, window, row)();
  return {window, l.row, l.pixel};
}

// What the epilogue reads.
struct Sums {
  static Vec load(const float* sums) { return F32::load(sums, kAllLanes); }
};

// int8: a scale for each position of a tile.
template <class E>
class TileScales {
 public:
  using Value = int8_t;

  TileScales(const Pixels& seen, const Tile& tile, int64_t C, float* /*memory*/, int64_t /*chunks*/) {
    Vec largest[kPositions];
    for (Vec& v : largest) v = set1(0);
    for_patches<E>(seen, tile.rows, tile.pixels, C,
                   [&](int64_t, int64_t, Lanes, int i, const Four& x) __attribute__((always_inline)) {
#pragma GCC unroll 4
                     for (int j = 0; j < 4; ++j) largest[i + j] = magnitude_max(largest[i + j], x.v[j]);
                   });
    for (int i = 0; i < kPositions; ++i) {
      const RowScale found = row_scale(largest_magnitude(largest[i]));
      scale_[i] = found.scale, inverse_[i] = found.inverse;
    }
  }

  void see(const Pixels&, int64_t, int64_t, int64_t) {}  // all was seen
  const float* of_parts() const { return nullptr; }

  // What a value of a patch, channel and position is multiplied by, and a sum of a position.
  float inverse(int64_t, int64_t, int i) const { return inverse_[i]; }
  static void store(int8_t* to, Lanes lanes, Vec x) { store_int8(to, lanes, x); }
  Vec sum(int i, Vec m) const { return m * set1(scale_[i]); }

 private:
  float scale_[kPositions], inverse_[kPositions];
};

// int16: a scale for each patch and chunk of channels.
template <class E>
class PatchScales {
 public:
  using Value = int16_t;

  // memory: 2 x 32 x chunks floats.
  PatchScales(const Pixels&, const Tile&, int64_t, float* memory, int64_t chunks)
      : scale_(memory), inverse_(memory + kTilePixels * chunks), chunks_(chunks) {}

  // The patches that make some rows of the result.
  void see(const Pixels& seen, int64_t rows, int64_t pixels, int64_t C) {
    using T = typename E::Type;
    const int64_t across = (pixels + 1) / 2;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t first = chunk * kWinogradChunk, count = C - first < kWinogradChunk ? C - first : kWinogradChunk;
      for (int64_t down = 0; 2 * down < rows; ++down) {
        const char* x = seen.first + 2 * down * seen.row + first * int64_t(sizeof(T));
        const auto column = [&](const char* x) __attribute__((always_inline)) {
          Vec largest = set1(0);
          for (int i = 0; i < 4; ++i)
            for_vectors(count, [&](int64_t c, Lanes lanes) __attribute__((always_inline)) {
              largest = magnitude_max(largest, E::load(reinterpret_cast<const T*>(x + i * seen.row) + c, lanes));
            });
          return largest;
        };
        Vec left = magnitude_max(column(x), column(x + seen.pixel));
        for (int64_t patch = down * across; patch < (down + 1) * across; ++patch) {
          x += 2 * seen.pixel;
          const Vec right = magnitude_max(column(x), column(x + seen.pixel));
          const RowScale found = row_scale(4 * largest_magnitude(magnitude_max(left, right)), 32767);
          scale_[chunk * kTilePixels + patch] = found.scale, inverse_[chunk * kTilePixels + patch] = found.inverse;
          left = right;
        }
      }
    }
  }
  const float* of_parts() const { return scale_; }

  float inverse(int64_t patch, int64_t c, int) const { return inverse_[c / kWinogradChunk * kTilePixels + patch]; }
  static void store(int16_t* to, Lanes lanes, Vec x) { store_int16(to, lanes, x); }
  static Vec sum(int, Vec m) { return m; }

 private:
  float *scale_, *inverse_;
  int64_t chunks_;
};

// E: the type of x and of the result; M: the products of an instruction set, of int8 or int16; S: their scales.
template <class E, class M, class S>
void winograd_tile(const Conv2d& p, const WinogradLayout& l, const Tile& tile, char* memory) {
  using Value = typename S::Value;
  char* const window = memory;
  char* const values = memory + l.seen.window;
  float* const products = reinterpret_cast<float*>(values + l.values);
  float* const sums = products + kPositions * l.position_sums();
  float* const row = sums + l.seen.group_sums();
  float* const result = row + round_up(p.C, 16);
  float* const patch_scales = result + round_up(p.N, 16);
  char* const buffer = reinterpret_cast<char*>(patch_scales + 2 * kTilePixels * l.chunks);
  const int64_t panels = (p.N + 15) / 16, across = (tile.pixels + 1) / 2;
  const int64_t K = l.products.pixel, position = l.products.row;  // of values, in bytes

  const Pixels seen = seen_by<E>(p, l.seen, tile, window, row);
  S scales(seen, tile, p.C, patch_scales, l.chunks);

  if (K != p.C * int64_t(sizeof(Value))) memset(values, 0, l.values);  // beyond C
  Pending<E, Sums> pending(p, l.seen, result);
  for (int64_t top = 0; top < tile.rows; top += kWinogradRows) {
    const int64_t rows = top + kWinogradRows < tile.rows ? kWinogradRows : tile.rows - top;
    const int64_t patches = (rows + 1) / 2 * across;
    const Pixels seen_here = {seen.first + top * seen.row, seen.row, seen.pixel};
    scales.see(seen_here, rows, tile.pixels, p.C);
    // By value: int8_t* may point to anything, so that whatever is in reach would be loaded again after every store.
    for_patches<E>(seen_here, rows, tile.pixels, p.C,
                   [=](int64_t patch, int64_t c, Lanes lanes, int i, const Four& x) __attribute__((always_inline)) {
                     char* to = values + i * position + patch * K + c * int64_t(sizeof(Value));
                     Four y;
                     for (int j = 0; j < 4; ++j) y.v[j] = x.v[j] * set1(scales.inverse(patch, c, i + j));
#pragma GCC unroll 4
                     for (int j = 0; j < 4; ++j)
                       S::store(reinterpret_cast<Value*>(to + j * position), lanes, y.v[j]);
                   });
    for (int64_t panel = 0; panel < panels; panel += kWinogradPanels) {
      const int64_t some = panel + kWinogradPanels < panels ? kWinogradPanels : panels - panel;
      for (int i = 0; i < kPositions; ++i) {
        const char* weight = static_cast<const char*>(p.weight) + (i * panels + panel) * l.products.panel;
        const Products q = {l.products, values + i * position, weight, some, 1, patches, 1, 1, l.products.packed,
                            products + i * l.position_sums(), buffer, scales.of_parts()};
        M::multiply_all(q, pending);
      }
      for (int64_t patch = 0; patch < patches; ++patch)
        for (int64_t n = 0; n < 16 * some; n += kLanes) {
          const float* from = products + patch * l.products.sums + n;
          float* to = sums + (patch / across * 2 * kTilePixels + patch % across * 2) * l.seen.sums + 16 * panel + n;
          Four first, second;  // rows of the result
          for (int j = 0; j < 4; ++j) {
            Four m;
            for (int i = 0; i < 4; ++i)
              m.v[i] = scales.sum(4 * i + j, M::load(from + (4 * i + j) * l.position_sums()));
            back(m, first.v[j], second.v[j]);
          }
          Vec y[4];
          back(first, y[0], y[1]), back(second, y[2], y[3]);
          F32::store(to, kAllLanes, y[0]), F32::store(to + l.seen.sums, kAllLanes, y[1]);
          to += kTilePixels * l.seen.sums;
          F32::store(to, kAllLanes, y[2]), F32::store(to + l.seen.sums, kAllLanes, y[3]);
        }
    }
    pending.set({tile.image, tile.row + top, tile.pixel, rows, tile.pixels}, 0, 1, sums);
    pending.finish();
  }
}

}  // namespace
}  // namespace sana
