// 3 x 3 convolutions, plain or of an upsampled image, with a quarter to 9/16 of the multiplications: the minimal
// filtering of Winograd (arXiv 1509.09308), on vectors, in int8 for W8A8 and in int16 for 16-bit floats (and for W8A8
// without int8 dot products).
//
// Algorithm (sana_kernels/conv2d/transforms.py), for each tile of the result, on one thread:
//     gather      the pixels of x that the tile sees, as they are; where all of them are inside the image and in one
//                 piece, they are read in place
//     forward     every patch of k x k pixels, of which there is one for r x r results, becomes k x k values per
//                 channel. In int8 each of the positions is quantised with one scale for the tile: once to know the
//                 largest values, once more to write them. In int16 a position of a patch has a scale for every 64
//                 channels, of their norm
//     products    at each position, patches x C times C x N: a 1 x 1 convolution of Conv2dKernels, panel by panel. Of
//                 int16, 64 products fit into an int32 (norms see to that); the sums of 64 are added as floats
//     back        of k x k sums per patch and column, times their scales, r x r results
//     epilogue    as ever
//
//                                      k, r    tile of x, pixels   multiplications per result
//     F(2x2, 3x3)    conv2d, int8      4, 2    8 x 32              4 C N, not 9
//     F(4x4, 3x3)    conv2d, int16     6, 4    8 x 64              2.25 C N, not 9
//     Upsampling     upsample, int16   3, 2    8 x 32              2.25 C N, not 4 of folded phases
//
// Tiling: 32 patches at a time. At C = N = 512 in int16, their values are 1.2 MB (33 KB at each position), the sums of 128
// columns 0.6 MB, and what the epilogue reads 1 MB; all of that comes from the second-level cache, or from the last, in
// long runs.
//
// FLOPs: twice the multiplications. Besides, by F(4x4, 3x3), for each pixel and vector of channels about 40 vector
// instructions (forward, norms, rounding), of columns about 15 for the way back. Bytes: x as conv2d.cpp; the weights
// (36 x 2 C N) once for 512 pixels, so that at C = N = 512 a core takes 4 bytes per cycle from the last cache.
// Bound: the multiply unit. Where bf16 and int8 run on AMX tiles, eight times as fast as on vectors, transforms would
// take longest: there the direct convolution is faster. Measured: bench/notes/decoder.md.
#pragma once

#include <math.h>

#include "conv2d/conv2d_vector.h"
#include "conv2d/transforms_vector.h"

namespace sana {
namespace {

// Pixels in rows, and how many bytes lie from one to the next.
struct Pixels {
  const char* first;
  int64_t row, pixel;
};

// Where values go: how many bytes lie from a position to the next, and from a patch to the next.
struct Values {
  char* first;
  int64_t position, patch;
};

// v[i] of column i, in one row of a patch whose columns are transformed.
template <class T>
inline void forward_row(const Vec (&column)[T::kSeen][T::kSeen], int i, Vec (&v)[T::kSeen]) {
  Vec row[T::kSeen];
  for (int j = 0; j < T::kSeen; ++j) row[j] = column[j][i];
  T::forward(row, v);
}

// A column of a patch, transformed.
template <class T, class E>
inline void forward_column(const char* x, int64_t below, Lanes lanes, Vec (&v)[T::kSeen]) {
  Vec d[T::kSeen];
  for (int i = 0; i < T::kSeen; ++i) d[i] = E::load(reinterpret_cast<const typename E::Type*>(x + i * below), lanes);
  T::forward(d, v);
}

// f(patch, c, lanes, i, values of the positions i, i + 1, ... of a row) for the patches that see rows x pixels of x, by
// rows, and all vectors of channels.
template <class T, class E, class F>
inline void for_patches(const Pixels& seen, int64_t rows, int64_t pixels, int64_t C, F f) {
  constexpr int kSeen = T::kSeen, kStep = T::kStep, kShared = kSeen - kStep;  // columns that the next patch sees too
  const char* const window = seen.first;
  const int64_t across = (pixels + kStep - 1) / kStep, below = seen.row, beside = seen.pixel;
  for (int64_t down = 0; kStep * down < rows; ++down)
    for_vectors(C, [=](int64_t c, Lanes lanes) __attribute__((always_inline)) {
      const char* x = window + kStep * down * below + c * int64_t(sizeof(typename E::Type));
      Vec column[kSeen][kSeen];
      for (int i = 0; i < kShared; ++i) forward_column<T, E>(x + i * beside, below, lanes, column[i]);
      for (int64_t patch = down * across; patch < (down + 1) * across; ++patch) {
        for (int i = kShared; i < kSeen; ++i) forward_column<T, E>(x + i * beside, below, lanes, column[i]);
#pragma GCC unroll 4
        for (int i = 0; i < kSeen; ++i) {
          Vec v[kSeen];
          forward_row<T>(column, i, v);
          f(patch, c, lanes, kSeen * i, v);
        }
        for (int i = 0; i < kShared; ++i)
          for (int j = 0; j < kSeen; ++j) column[i][j] = column[i + kStep][j];
        x += kStep * beside;
      }
    });
}

// What a tile sees: pixels of x, or brought together in a window, with zeros around the image.
template <class T, class E>
Pixels seen_by(const Conv2d& p, const Layout& l, const Tile& tile, char* window, float* row) {
  constexpr int64_t kWidth = T::kPatches.width;
  const bool inside = tile.row > 0 && tile.row + kTileRows < p.band.height && tile.rows == kTileRows && tile.pixel > 0 &&
                      tile.pixel + kWidth < p.width && tile.pixels == kWidth;
  const int64_t top = tile.row - 1 - p.band.start;
  if (inside && p.input_norm.weight == nullptr && p.x.together(top, top + kTileRows + 1)) {
    const int64_t pixel = p.C * int64_t(sizeof(typename E::Type)), below = p.width * pixel;
    return {p.x.at(tile.image, top, below) + (tile.pixel - 1) * pixel, below, pixel};
  }
  Gather<E>(p, l, tile, window, row)();
  return {window, l.row, l.pixel};
}

// What the epilogue reads.
struct Sums {
  static Vec load(const float* sums) { return F32::load(sums, kAllLanes); }
};

// int8: a scale for each position of a tile.
template <class T, class E>
class TileValues {
 public:
  using Value = int8_t;

  TileValues(const Pixels& seen, const Tile& tile, int64_t C, float* /*scales*/) : C_(C) {
    Vec largest[T::kPositions];
    for (Vec& v : largest) v = set1(0);
    for_patches<T, E>(seen, tile.rows, tile.pixels, C,
                      [&](int64_t, int64_t, Lanes, int i, const Vec(&v)[T::kSeen]) __attribute__((always_inline)) {
#pragma GCC unroll 4
                        for (int j = 0; j < T::kSeen; ++j) largest[i + j] = magnitude_max(largest[i + j], v[j]);
                      });
    for (int i = 0; i < T::kPositions; ++i) {
      const RowScale found = row_scale(largest_magnitude(largest[i]));
      scale_[i] = found.scale, inverse_[i] = found.inverse;
    }
  }

  // Of the patches that see some rows.
  void write(const Pixels& seen, int64_t rows, int64_t pixels, const Values& values) {
    // By value: int8_t* may point to anything, so that whatever is in reach would be loaded again after every store.
    for_patches<T, E>(seen, rows, pixels, C_,
                      [=, *this](int64_t patch, int64_t c, Lanes lanes, int i, const Vec(&v)[T::kSeen])
                          __attribute__((always_inline)) {
                            char* to = values.first + i * values.position + patch * values.patch + c;
                            Vec y[T::kSeen];
                            for (int j = 0; j < T::kSeen; ++j) y[j] = v[j] * set1(inverse_[i + j]);
#pragma GCC unroll 4
                            for (int j = 0; j < T::kSeen; ++j)
                              store_int8(reinterpret_cast<int8_t*>(to + j * values.position), lanes, y[j]);
                          });
  }

  // What a sum of a position is multiplied by, here or in the products.
  Vec scale(int i) const { return set1(scale_[i]); }
  const float* of_parts(int) const { return nullptr; }

 private:
  float scale_[T::kPositions], inverse_[T::kPositions];
  int64_t C_;
};

inline float sum_of_squares(const float* x, int64_t count, float factor) {
  Vec squares = set1(0);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec v = F32::load(x + i, kAllLanes) * set1(factor);
    squares = fmadd(v, v, squares);
  }
  return sum(squares);
}

// The root of the sum of `count` squares that floats do not hold well. NaN or infinite if a value is; where it is far below
// what a scale may be, the largest of them.
inline float norm_of_extremes(const float* x, int64_t count) {
  Vec most = set1(0);
  for (int64_t i = 0; i < count; i += kLanes) most = magnitude_max(most, F32::load(x + i, kAllLanes));
  const float largest = largest_magnitude(most);
  if (!(largest > 0x1p-110f && largest < INFINITY)) return largest;
  return largest * sqrtf(sum_of_squares(x, count, 1 / largest));
}

// int16: a scale for each patch, position and chunk of channels.
template <class T, class E>
class PatchValues {
 public:
  using Value = int16_t;

  // scales: room for positions x chunks x 32.
  PatchValues(const Pixels&, const Tile&, int64_t C, float* scales)
      : C_(C), chunks_((C + kWinogradChunk - 1) / kWinogradChunk), scales_(scales) {}

  void write(const Pixels& seen, int64_t rows, int64_t pixels, const Values& values) {
    constexpr int kSeen = T::kSeen, kStep = T::kStep;
    const int64_t across = (pixels + kStep - 1) / kStep;
    float v[T::kPositions * kWinogradChunk], norm[T::kPositions + kLanes] = {};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t first = chunk * kWinogradChunk, count = C_ - first < kWinogradChunk ? C_ - first : kWinogradChunk;
      const int64_t padded = round_up(count, kLanes);
      for (int64_t down = 0; kStep * down < rows; ++down)
        for (int64_t i = 0; i < across; ++i) {
          const char* x = seen.first + kStep * (down * seen.row + i * seen.pixel) + first * sizeof(typename E::Type);
          for_vectors(count, [&](int64_t c, Lanes lanes) __attribute__((always_inline)) {
            Vec column[kSeen][kSeen];
            for (int j = 0; j < kSeen; ++j)
              forward_column<T, E>(x + c * sizeof(typename E::Type) + j * seen.pixel, seen.row, lanes, column[j]);
            for (int j = 0; j < kSeen; ++j) {
              Vec row[kSeen];
              forward_row<T>(column, j, row);
              for (int k = 0; k < kSeen; ++k)
                F32::store(v + (kSeen * j + k) * kWinogradChunk + c, kAllLanes, row[k]);
            }
          });
          const int64_t patch = down * across + i;
          char* to = values.first + patch * values.patch + first * int64_t(sizeof(Value));
          for (int j = 0; j < T::kPositions; ++j) norm[j] = sum_of_squares(v + j * kWinogradChunk, padded, 1);
          for (int j = 0; j < T::kPositions; j += kLanes)
            F32::store(norm + j, kAllLanes, sqrt(F32::load(norm + j, kAllLanes)));
          for (int j = 0; j < T::kPositions; ++j, to += values.position) {
            const float* row = v + j * kWinogradChunk;
            if (!(norm[j] > 0x1p-30f && norm[j] < 0x1p60f)) norm[j] = norm_of_extremes(row, padded);
            const RowScale scale = row_scale(norm[j], 32767);
            scales_[(j * chunks_ + chunk) * kTilePixels + patch] = scale.scale;
            for_vectors(count, [&](int64_t c, Lanes lanes) __attribute__((always_inline)) {
              store_int16(reinterpret_cast<Value*>(to) + c, lanes, F32::load(row + c, lanes) * set1(scale.inverse));
            });
          }
        }
    }
  }

  static Vec scale(int) { return set1(1); }
  const float* of_parts(int i) const { return scales_ + i * chunks_ * kTilePixels; }

 private:
  int64_t C_, chunks_;
  float* scales_;
};

// T: the transform; E: the type of x and of the result; M: the products of an instruction set, of int8 or int16; S: how
// values are rounded to them.
template <class T, class E, class M, template <class, class> class S>
void winograd_tile(const Conv2d& of_integers, const Tile& tile, char* memory) {
  using Value = typename S<T, E>::Value;
  const WinogradLayout l = winograd_layout(of_integers);
  const float* const weight_scale = of_integers.weight_scale;
  Conv2d p = of_integers;
  p.weight_scale = nullptr;  // they are applied here, not in the epilogue
  char* const window = memory;
  char* const values = memory + l.seen.window;
  float* const products = reinterpret_cast<float*>(values + l.values);
  float* const sums = products + T::kPositions * l.position_sums();
  float* const row = sums + l.seen.groups * l.seen.group_sums();
  float* const result = row + round_up(p.C, 16);
  float* const part_scales = result + round_up(p.N, 16);
  char* const buffer = reinterpret_cast<char*>(part_scales + T::kPositions * l.chunks * kTilePixels);
  const int64_t panels = (p.N + 15) / 16, across = (tile.pixels + T::kStep - 1) / T::kStep;
  const int64_t K = l.products.pixel, position = l.products.row;  // of values, in bytes

  const Pixels seen = seen_by<T, E>(p, l.seen, tile, window, row);
  S<T, E> quantized(seen, tile, p.C, part_scales);

  // From a result to the one below and beside: in the next row and pixel, or of other phases.
  const int64_t below = p.phases == 4 ? 2 * l.seen.group_sums() : kTilePixels * l.seen.sums;
  const int64_t beside = p.phases == 4 ? l.seen.group_sums() : l.seen.sums;
  if (K != p.C * int64_t(sizeof(Value))) memset(values, 0, l.values);  // beyond C
  Pending<E, Sums> pending(p, l.seen, result);
  for (int64_t top = 0; top < tile.rows; top += T::kPatches.rows()) {
    const int64_t rows = top + T::kPatches.rows() < tile.rows ? T::kPatches.rows() : tile.rows - top;
    const int64_t patches = (rows + T::kStep - 1) / T::kStep * across;
    quantized.write({seen.first + top * seen.row, seen.row, seen.pixel}, rows, tile.pixels, {values, position, K});
    for (int64_t panel = 0; panel < panels; panel += kWinogradPanels) {
      const int64_t some = panel + kWinogradPanels < panels ? kWinogradPanels : panels - panel;
      for (int i = 0; i < T::kPositions; ++i) {
        const char* weight = static_cast<const char*>(p.weight) + (panel * T::kPositions + i * some) * l.products.panel;
        const Products q = {l.products, values + i * position, weight, some, 1, patches, 1, 1, l.products.packed,
                            products + i * l.position_sums(), buffer, quantized.of_parts(i)};
        M::multiply_all(q, pending);
      }
      const int64_t columns = 16 * (panel + some) < p.N ? 16 * some : p.N - 16 * panel;
      for (int64_t patch = 0; patch < patches; ++patch) {
        const int64_t pixel = patch % across * T::kStep;
        float* const to = sums + pixel / kTilePixels * l.seen.group_sums() +
                          (patch / across * T::kStep * kTilePixels + pixel % kTilePixels) * l.seen.sums + 16 * panel;
        const float* const from = products + patch * l.products.sums;
        for_vectors(columns, [&](int64_t n, Lanes lanes) __attribute__((always_inline)) {
          Vec down[T::kSeen][T::kMade];  // rows of the result, of each column
          for (int j = 0; j < T::kSeen; ++j) {
            Vec m[T::kSeen];
            for (int i = 0; i < T::kSeen; ++i) {
              const int at = T::kSeen * i + j;
              const Vec scale = F32::load(weight_scale + at * p.N + 16 * panel + n, lanes) * quantized.scale(at);
              m[i] = M::load(from + at * l.position_sums() + n) * scale;
            }
            T::back(m, down[j]);
          }
          for (int i = 0; i < T::kMade; ++i) {
            Vec m[T::kSeen], y[T::kMade];
            for (int j = 0; j < T::kSeen; ++j) m[j] = down[j][i];
            T::back(m, y);
            for (int j = 0; j < T::kMade; ++j) F32::store(to + i * below + j * beside + n, kAllLanes, y[j]);
          }
        });
      }
    }
    for (int64_t group = 0; group < l.seen.groups; ++group) {
      const int64_t first = p.phases == 4 ? 0 : group * kTilePixels;
      const int64_t pixels = tile.pixels - first < kTilePixels ? tile.pixels - first : kTilePixels;
      if (pixels <= 0) break;
      pending.set({tile.image, tile.row + top, tile.pixel + first, rows, pixels}, p.phases == 4 ? group : 0, 1,
                  sums + group * l.seen.group_sums());
      pending.finish();
    }
  }
}

}  // namespace
}  // namespace sana
