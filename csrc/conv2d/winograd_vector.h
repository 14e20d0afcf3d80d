// 3 x 3 convolutions, plain or of an upsampled image, with a quarter or 9/16 of the multiplications: the minimal
// filtering of Winograd (arXiv 1509.09308), on vectors, in int8 for W8A8 and in int16 for 16-bit floats (and for W8A8
// without int8 dot products).
//
// Algorithm (sana_kernels/conv2d/transforms.py), for each tile of the result, on one thread:
//     gather      the pixels of x that the tile sees, as they are; where all of them are inside the image and in one
//                 piece, they are read in place
//     forward     every patch of k x k pixels, of which there is one for r x r results, becomes k x k values per
//                 channel. A position of a patch has a scale for every chunk of channels, of their largest value
//                 (int8) or of their norm (int16)
//     products    at each position, patches x C times C x N: a 1 x 1 convolution of Conv2dKernels, panel by panel. A
//                 chunk's products fit into an int32 (norms see to that in int16); the chunks are added as floats
//     back        of k x k sums per patch and column, times their weights' scales, r x r results
//     epilogue    as ever
//
//                              k, r    tile of x, pixels   multiplications per result
//     F(4x4, 3x3)    conv2d    6, 4    8 x 64              2.25 C N, not 9
//     Upsampling     upsample  3, 2    8 x 32              2.25 C N, not 4 of folded phases
//
// Tiling: 32 patches at a time. At C = N = 512 in int16, their values are 1.2 MB (33 KB at each position; half of it in
// int8), the sums of 128 columns 0.6 MB, and what the epilogue reads 1 MB; all of that comes from the second-level cache,
// or from the last, in long runs.
//
// FLOPs: twice the multiplications. Besides, by F(4x4, 3x3), for each pixel and vector of channels about 40 vector
// instructions (forward, scales, rounding), of columns about 15 for the way back. Bytes: x as conv2d.cpp; the weights
// (36 C N integers) once for 512 pixels, so that at C = N = 512 in int16 a core takes 4 bytes per cycle from the last
// cache.
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

// The integers that values become: kMost of them are as much as a size, which `sizes` finds for some positions, `count`
// values each, kChunk apart; it may write a vector beyond.
struct NormInt16 {
  using Value = int16_t;
  static constexpr float kMost = 32767;
  static constexpr int64_t kChunk = kChunkBytes / sizeof(Value);

  static void sizes(const float* v, int positions, int64_t count, float* size) {
    for (int i = 0; i < positions; ++i) size[i] = sum_of_squares(v + i * kChunk, count, 1);
    for (int i = 0; i < positions; i += kLanes) F32::store(size + i, kAllLanes, sqrt(F32::load(size + i, kAllLanes)));
    for (int i = 0; i < positions; ++i)
      if (!(size[i] > 0x1p-30f && size[i] < 0x1p60f)) size[i] = norm_of_extremes(v + i * kChunk, count);
  }
  static void store(Value* to, Lanes lanes, Vec x) { store_int16(to, lanes, x); }
};

struct LargestInt8 {
  using Value = uint8_t;  // 128 more, as Int8Chunks reads it
  static constexpr float kMost = 127;
  static constexpr int64_t kChunk = kChunkBytes / sizeof(Value);

  static void sizes(const float* v, int positions, int64_t count, float* size) {
    for (int i = 0; i < positions; ++i) {
      Vec most = set1(0);
      for (int64_t j = 0; j < count; j += kLanes) most = magnitude_max(most, F32::load(v + i * kChunk + j, kAllLanes));
      size[i] = largest_magnitude(most);
    }
  }
  static void store(Value* to, Lanes lanes, Vec x) { store_uint8(to, lanes, x); }
};

// Writes the values of the patches that see rows x pixels of x, and for each patch, position and chunk of channels a scale:
// scales has room for positions x chunks x 32. T: the transform; E: the type of x.
template <class T, class E, class Integers>
void write_values(const Pixels& seen, int64_t rows, int64_t pixels, int64_t C, const Values& values, float* scales) {
  using Type = typename E::Type;
  using Value = typename Integers::Value;
  constexpr int kSeen = T::kSeen, kStep = T::kStep, kPositions = T::kPositions;
  constexpr int64_t kChunk = Integers::kChunk;
  const int64_t across = ceil_div(pixels, kStep), chunks = ceil_div(C, kChunk);
  float v[kPositions * kChunk], size[kPositions + kLanes] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * kChunk, count = C - first < kChunk ? C - first : kChunk;
    for (int64_t down = 0; kStep * down < rows; ++down)
      for (int64_t i = 0; i < across; ++i) {
        const char* x = seen.first + kStep * (down * seen.row + i * seen.pixel) + first * sizeof(Type);
        for_vectors(count, [&](int64_t c, Lanes lanes) __attribute__((always_inline)) {
          Vec column[kSeen][kSeen];
          for (int j = 0; j < kSeen; ++j)
            forward_column<T, E>(x + c * sizeof(Type) + j * seen.pixel, seen.row, lanes, column[j]);
          for (int j = 0; j < kSeen; ++j) {
            Vec row[kSeen];
            forward_row<T>(column, j, row);
            for (int k = 0; k < kSeen; ++k) F32::store(v + (kSeen * j + k) * kChunk + c, kAllLanes, row[k]);
          }
        });
        Integers::sizes(v, kPositions, round_up(count, kLanes), size);
        const int64_t patch = down * across + i;
        char* to = values.first + patch * values.patch + first * int64_t(sizeof(Value));
        for (int j = 0; j < kPositions; ++j, to += values.position) {
          const float* const row = v + j * kChunk;
          const RowScale scale = row_scale(size[j], Integers::kMost);
          scales[(j * chunks + chunk) * kTilePixels + patch] = scale.scale;
          for_vectors(count, [&](int64_t c, Lanes lanes) __attribute__((always_inline)) {
            Integers::store(reinterpret_cast<Value*>(to) + c, lanes, F32::load(row + c, lanes) * set1(scale.inverse));
          });
        }
      }
  }
}

// T: the transform; E: the type of x and of the result; M: the products of an instruction set, of `Integers`.
template <class T, class E, class M, class Integers>
void winograd_tile(const Conv2d& of_integers, const Tile& tile, char* memory) {
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
  float* const scales = result + round_up(p.N, 16);
  char* const buffer = reinterpret_cast<char*>(scales + T::kPositions * l.chunks * kTilePixels);
  const int64_t panels = ceil_div(p.N, 16), across = ceil_div(tile.pixels, T::kStep);
  const int64_t K = l.products.pixel, position = l.products.row;  // of values, in bytes

  const Pixels seen = seen_by<T, E>(p, l.seen, tile, window, row);

  // From a result to the one below and beside: in the next row and pixel, or of other phases.
  const int64_t below = p.phases == 4 ? 2 * l.seen.group_sums() : kTilePixels * l.seen.sums;
  const int64_t beside = p.phases == 4 ? l.seen.group_sums() : l.seen.sums;
  if (K != p.C * int64_t(sizeof(typename Integers::Value))) memset(values, 0, l.values);  // beyond C
  Pending<E, Sums> pending(p, l.seen, result);
  for (int64_t top = 0; top < tile.rows; top += T::kPatches.rows()) {
    const int64_t rows = top + T::kPatches.rows() < tile.rows ? T::kPatches.rows() : tile.rows - top;
    const int64_t patches = ceil_div(rows, T::kStep) * across;
    write_values<T, E, Integers>({seen.first + top * seen.row, seen.row, seen.pixel}, rows, tile.pixels, p.C,
                                 {values, position, K}, scales);
    for (int64_t panel = 0; panel < panels; panel += kWinogradPanels) {
      const int64_t some = panel + kWinogradPanels < panels ? kWinogradPanels : panels - panel;
      for (int i = 0; i < T::kPositions; ++i) {
        const char* weight = static_cast<const char*>(p.weight) + (panel * T::kPositions + i * some) * l.products.panel;
        const Products q = {l.products, values + i * position, weight, some, 1, patches, 1, 1, l.products.packed,
                            products + i * l.position_sums(), buffer, scales + i * l.chunks * kTilePixels};
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
              const Vec scale = F32::load(weight_scale + at * p.N + 16 * panel + n, lanes);
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
