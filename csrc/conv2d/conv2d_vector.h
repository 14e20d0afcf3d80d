// Tiles of the DC-AE's convolutions: what stands before and after the products, on vectors; include common/avx512.h,
// avx2.h or portable.h first. conv2d.cpp has the algorithm.
#pragma once

#include <string.h>

#include "conv2d/norm_vector.h"
#include "gemm/quantize.h"

namespace sana {
namespace {

// Bytes of K that are summed apart first, or 0: all of them in one chain. fp32 needs it; rounding to 16 bits hides what
// a chain loses, and integers lose nothing. Of a transform, a chunk, which has a scale.
template <class T>
constexpr int64_t kPart = T::kScaled ? kChunkBytes : 0;

// Bytes of the weights' K that stand before those of a part: what its sums start with.
template <class T>
constexpr int64_t kStart = 0;

// f(x, k, bytes) for consecutive parts of K: where a pixel sees them, how far they are in the weights' K, their size.
template <class T, class F>
inline __attribute__((always_inline)) void for_parts(const Products& q, F f) {
  const int64_t most = kPart<T> == 0 ? q.bytes : kPart<T>;
  for (int64_t i = 0; i < q.kernel; ++i)
    for (int64_t j = 0, k = i * q.layout.packed; j < q.bytes; j += most, k += most + kStart<T>)
      f(i * q.layout.row + j, k, most < q.bytes - j ? most : q.bytes - j);
}

// Are parts of floats, which few pixels sum as four chains? That rounds less: a library may sum so few as the lanes of a
// vector, and is as exact as that. (On AVX-512 there are registers for them, and one chain would wait for each sum.)
template <class T>
constexpr bool kQuarters = kPart<T> != 0 && !T::kScaled;

// f(i, from, bytes) for the quarters of such a part.
template <class F>
inline __attribute__((always_inline)) void for_quarters(int64_t bytes, F f) {
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t from = 16 * i < bytes ? 16 * i : bytes;
    f(i, from, bytes - from < 16 ? bytes - from : 16);
  }
}

// What the products of a group's pixels are off by, where a type has such a thing (gemm/multiply_avx512.h).
template <class T>
struct Corrections {
  int of[kTileRows][kTilePixels];

  explicit Corrections(const Products& q) {
    if constexpr (kPart<T> == 0) of_all(q);  // others have none
  }

 private:
  void of_all(const Products& q) {
    int of_taps[2 * (kTileRows - 1) + 3][kTilePixels];  // of a row of taps, which several rows of the result see
    for (int64_t row = 0; row < q.stride * (q.rows - 1) + q.kernel; ++row)
      for (int64_t pixel = 0; pixel < q.pixels; ++pixel)
        of_taps[row][pixel] = T::correction(q.window + row * q.layout.row + q.stride * pixel * q.layout.pixel, q.bytes);
    for (int64_t row = 0; row < q.rows; ++row)
      for (int64_t pixel = 0; pixel < q.pixels; ++pixel) {
        of[row][pixel] = 0;
        for (int64_t i = 0; i < q.kernel; ++i) of[row][pixel] += of_taps[q.stride * row + i][pixel];
      }
  }
};

// The first pixel of a row of x's image.
template <class T>
const T* pixels_of(const Conv2d& p, int64_t image, int64_t row) {
  return reinterpret_cast<const T*>(p.x.at(image, row - p.band.start, p.width * p.C * sizeof(T)));
}

// The pixels of x that a tile sees: from `top`, `left` on, of which those in the image are first ... last - 1.
struct Seen {
  int64_t image = 0, top = 0, left = 0, first_row = 0, last_row = 0, first_pixel = 0, last_pixel = 0;
  bool inside = false;  // all of them

  Seen() = default;
  Seen(const Conv2d& p, const Tile& tile) : image(tile.image) {
    top = p.stride * tile.row - 1, left = p.stride * tile.pixel - 1;
    const int64_t bottom = top + p.stride * (tile.rows - 1) + 3, right = left + p.stride * (tile.pixels - 1) + 3;
    first_row = top < 0 ? 0 : top, last_row = bottom < p.band.height ? bottom : p.band.height;
    first_pixel = left < 0 ? 0 : left, last_pixel = right < p.width ? right : p.width;
    inside = first_row == top && last_row == bottom && first_pixel == left && last_pixel == right;
  }
};

// Brings what a tile sees into the window: normalised, quantised where the weights are (then it returns the tile's
// scale, else 1), with zeros around the image. E: the type of x.
template <class E>
class Gather {
 public:
  using T = typename E::Type;

  Gather(const Conv2d& p, const Layout& layout, const Tile& tile, char* window, float* row)
      : p_(p), layout_(layout), seen_(p, tile), window_(window), row_(row) {
    // Pixels may follow each other without a gap: then a row of them is a single run of elements.
    const int64_t element = p.weight_scale == nullptr ? sizeof(T) : 1;
    whole_rows_ = p.input_norm.weight == nullptr && layout.pixel == p.C * element;
    const int64_t row_seen = (p.stride * (tile.pixels - 1) + 3) * layout.pixel;
    whole_tile_ = seen_.inside && tile.rows == kTileRows && round_up(row_seen, 64) == layout.row;
  }

  float operator()() {
    clear();
    if (p_.weight_scale == nullptr) {
      for_runs([&](const T* x, int64_t count, char* to) {
        if (p_.input_norm.weight == nullptr) {
          memcpy(to, x, count * sizeof(T));
        } else {
          normalized(x, [&](int64_t c, Lanes lanes, Vec y) { E::store(reinterpret_cast<T*>(to) + c, lanes, y); });
        }
      });
      return 1;
    }
    const bool as_is = p_.input_norm.weight == nullptr;
    Vec largest = set1(0);
    for_runs([&](const T* x, int64_t count, char*) {
      if (!as_is) largest = magnitude_max(largest, normalized(x), p_.C);
      else if constexpr (sizeof(T) == 2) largest = magnitude_max_bf16(largest, x, count);
      else largest = magnitude_max(largest, x, count);
    });
    const RowScale scale = row_scale(largest_magnitude(largest));
    const Vec inverse = set1(scale.inverse);
    for_runs([&](const T* x, int64_t count, char* window) {
      int8_t* const to = reinterpret_cast<int8_t*>(window);
      if (as_is)
        return store_int8_row(to, count, [&](int64_t c, Lanes lanes) { return E::load(x + c, lanes) * inverse; });
      const float* const y = normalized(x);
      store_int8_row(to, p_.C, [&](int64_t c, Lanes lanes) { return F32::load(y + c, lanes) * inverse; });
    });
    return scale.scale;
  }

 private:
  // What is not overwritten has to be zero: around the image, between pixels and at the end. What lies between the end of a
  // row and the next meets weights of zero in int8, else none.
  void clear() {
    const int64_t kept = whole_rows_ && whole_tile_ ? layout_.window - 64 : 0;
    memset(window_ + kept, 0, layout_.window - kept);
  }

  // f(x, count, to) for all runs of consecutive elements that the tile sees, and their place in the window.
  template <class F>
  inline __attribute__((always_inline)) void for_runs(F f) {
    const int64_t step = whole_rows_ ? seen_.last_pixel - seen_.first_pixel : 1;
    for (int64_t row = seen_.first_row; row < seen_.last_row; ++row) {
      const T* x = pixels_of<T>(p_, seen_.image, row);
      char* const to = window_ + (row - seen_.top) * layout_.row;
      for (int64_t pixel = seen_.first_pixel; pixel < seen_.last_pixel; pixel += step)
        f(x + pixel * p_.C, step * p_.C, to + (pixel - seen_.left) * layout_.pixel);
    }
  }

  template <class F>
  void normalized(const T* x, F f) {
    normalize(p_.C, p_.input_norm, p_.eps, [&](int64_t c, Lanes lanes) { return E::load(x + c, lanes); },
              [&](int64_t c, Lanes lanes, Vec y) { f(c, lanes, activate<E>(p_.input_activation, y)); });
  }

  // The same as floats, in memory.
  const float* normalized(const T* x) {
    normalized(x, [&](int64_t c, Lanes lanes, Vec y) { F32::store(row_ + c, lanes, y); });
    return row_;
  }

  const Conv2d& p_;
  const Layout& layout_;
  const Seen seen_;
  char* window_;
  float* row_;
  bool whole_rows_, whole_tile_;
};

// What a tile will see of x, or nothing, fetched a few cache lines at a time.
template <class T>
class Fetch {
 public:
  Fetch() = default;
  Fetch(const Conv2d& p, const Tile& tile) : p_(&p), seen_(p, tile) {
    bytes_ = (seen_.last_pixel - seen_.first_pixel) * p.C * int64_t(sizeof(T));
    row_ = seen_.first_row;
    begin_row();
  }

  int64_t lines_left() const { return (seen_.last_row - row_) * (bytes_ / kLine + 1); }  // about
  void run(int64_t lines) {
    for (; lines > 0 && row_ < seen_.last_row; --lines) {
      __builtin_prefetch(at_, 0, 2);  // into the second-level cache
      if ((at_ += kLine) >= end_) ++row_, begin_row();
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  void begin_row() {
    if (row_ >= seen_.last_row) return;
    at_ = reinterpret_cast<const char*>(pixels_of<T>(*p_, seen_.image, row_) + seen_.first_pixel * p_->C);
    end_ = at_ + bytes_;
  }

  const Conv2d* p_ = nullptr;
  Seen seen_;
  int64_t bytes_ = 0, row_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

// Pixels further along a row which an epilogue asks for, so that they have come when it is their turn. The last ones of a
// tile ask for the next tile's.
constexpr int64_t kPixelsAhead = 4;

// What becomes of a pixel's sums. M::load makes floats of them.
template <class E, class M>
class Epilogue {
 public:
  using T = typename E::Type;

  Epilogue(const Conv2d& p, float* row) : p_(p), row_(row), width_(width_of_result(p)) {}

  // Pixel `pixel` of row `row` of the image's result (of phases, the pixel of x that it comes of).
  void operator()(int64_t image, int64_t row, int64_t pixel, int phase, float x_scale, const float* sums) const {
    // Copies of what every vector needs: after a store, p_'s own would be read again.
    const Band band = p_.band;
    const int64_t N = p_.N;
    const Activation activation = p_.activation;
    const float* const scale = p_.weight_scale == nullptr ? nullptr : p_.weight_scale + phase * N;
    const float* const bias = p_.bias == nullptr || !p_.bias_by_phase ? p_.bias : p_.bias + phase * N;
    const auto result = [=](int64_t n, Lanes lanes) __attribute__((always_inline)) {
      Vec y = M::load(sums + n);
      if (scale != nullptr) y = y * (F32::load(scale + n, lanes) * set1(x_scale));
      if (bias != nullptr) y = y + F32::load(bias + n, lanes);
      return activate<E>(activation, y);
    };
    if (p_.phases == 4) {
      const int64_t index = (image * 2 * (band.last - band.first) + 2 * (row - band.first) + phase / 2) * 2 * p_.width;
      T* const out = static_cast<T*>(p_.out) + (index + 2 * pixel + phase % 2) * N;
      const T* const x = pixels_of<T>(p_, image, row) + pixel * p_.C;
      return for_vectors(N, [=](int64_t n, Lanes lanes) __attribute__((always_inline)) {
        __builtin_prefetch(out + n + 2 * kPixelsAhead * N);
        E::store(out + n, lanes, result(n, lanes) + shortcut(x, phase, n, lanes));
      });
    }
    const int64_t rows = band.last - band.first, of_row = width_ * N;
    T* const out = static_cast<T*>(p_.out) + (image * rows + row - band.first) * of_row + pixel * N;
    const T* residual = nullptr;
    if (p_.residual.rest != nullptr)
      residual = reinterpret_cast<const T*>(p_.residual.at(image, row - band.first, of_row * sizeof(T))) + pixel * N;
    const auto store = [=](int64_t n, Lanes lanes, Vec y) __attribute__((always_inline)) {
      __builtin_prefetch(out + n + kPixelsAhead * N);
      if (residual != nullptr) {
        __builtin_prefetch(residual + n + kPixelsAhead * N);
        y = y + E::load(residual + n, lanes);
      }
      E::store(out + n, lanes, y);
    };
    if (p_.norm.weight == nullptr)
      return for_vectors(N, [=](int64_t n, Lanes lanes)
                                __attribute__((always_inline)) { store(n, lanes, result(n, lanes)); });
    float* const kept = row_;
    const auto again = [=](int64_t n, Lanes lanes) { return F32::load(kept + n, lanes); };
    const auto first = [=](int64_t n, Lanes lanes) __attribute__((always_inline)) {
      const Vec y = result(n, lanes);
      F32::store(kept + n, lanes, y);
      return lanes == kAllLanes ? y : again(n, lanes);  // without what is beyond N
    };
    normalize(N, p_.norm, p_.eps, first, again, store);
  }

 private:
  // What channels n, n + 1, ... of phase 2 dy + dx get: channel (4 n + phase) / repeats of x.
  Vec shortcut(const T* x, int phase, int64_t n, Lanes lanes) const {
    const int64_t repeats = 4 * p_.N / p_.C;
    if (repeats == 4) return E::load(x + n, lanes);
    if (repeats == 2 && sizeof(T) == 2)
      return bf16_of_two(F32::load(reinterpret_cast<const float*>(x + 2 * n), lanes), phase / 2 == 1);
    float channels[kLanes] = {};
    for (int64_t i = 0; i < kLanes && n + i < p_.N; ++i) {
      const T value = x[(4 * (n + i) + phase) / repeats];
      channels[i] = sizeof(T) == 4 ? float(value) : bf16_to_float(uint16_t(value));
    }
    return F32::load(channels, kAllLanes);
  }

  const Conv2d& p_;
  float* const row_;
  const int64_t width_;  // of the result, of phases 1
};

// What can be done beside the products of a group of rows: the epilogue of the one before, whose sums are there, a pixel
// at a time, and fetching the next tile.
template <class E, class M>
class Pending {
 public:
  Pending(const Conv2d& p, const Layout& layout, float* row) : epilogue_(p, row), layout_(layout) {}

  // `rows`: some rows of a tile, whose inputs had `x_scale`.
  void set(const Tile& rows, int phase, float x_scale, const float* sums) {
    rows_ = rows, phase_ = phase, x_scale_ = x_scale, sums_ = sums;
    row_ = pixel_ = 0;
  }
  int64_t left() const { return (rows_.rows - row_) * rows_.pixels - pixel_; }
  void pixel() {
    epilogue_(rows_.image, rows_.row + row_, rows_.pixel + pixel_, phase_, x_scale_,
              sums_ + (row_ * kTilePixels + pixel_) * layout_.sums);
    if (++pixel_ == rows_.pixels) pixel_ = 0, ++row_;
  }
  void finish() {
    while (row_ < rows_.rows) pixel();
  }

  Fetch<typename E::Type> next_tile;  // for AMX

 private:
  Epilogue<E, M> epilogue_;
  const Layout& layout_;
  Tile rows_ = {};
  int phase_ = 0;
  float x_scale_ = 1;
  const float* sums_ = nullptr;
  int64_t row_ = 0, pixel_ = 0;
};

// E: the type of x and of the result; M: the products of an instruction set.
template <class E, class M>
void tiles_of(const Conv2d& p, const Layout& l, const Tile& tiles, char* memory) {
  char* const window = memory;
  float* const sums = reinterpret_cast<float*>(memory + l.window);
  float* const row = sums + l.groups * l.group_sums();
  float* const result = row + round_up(p.C, 16);
  char* const buffer = reinterpret_cast<char*>(result + round_up(p.N, 16));
  const int64_t panels = ceil_div(p.N, 16);
  // In int8 the padding takes part, which is zero in the weights: corrections are sums of whole vectors then.
  const int64_t bytes = p.weight_scale == nullptr ? l.taps : l.packed;
  Pending<E, M> pending(p, l, result);
  const int64_t width = width_of_result(p);
  int64_t count = 0;
  for (int64_t first = 0; first < tiles.pixels; first += kTilePixels) {
    const int64_t pixels = first + kTilePixels < tiles.pixels ? kTilePixels : tiles.pixels - first;
    const Tile tile = {tiles.image, tiles.row, tiles.pixel + first, tiles.rows, pixels};
    const float x_scale = Gather<E>(p, l, tile, window, row)();
    const int64_t next = tile.pixel + kTilePixels;  // most likely this thread's, beyond `tiles` too
    const int64_t some = width - next < kTilePixels ? width - next : kTilePixels;
    if (some > 0) pending.next_tile = {p, {tile.image, tile.row, next, tile.rows, some}};
    for (int64_t top = 0; top < tile.rows; top += l.group) {
      const int64_t rows = top + l.group < tile.rows ? l.group : tile.rows - top;
      for (int phase = 0; phase < p.phases; ++phase, ++count) {
        const int64_t shift = p.kernel == 2 ? phase / 2 * l.row + phase % 2 * l.pixel : 0;
        const char* const weights = static_cast<const char*>(p.weight);
        const auto weight = [&](int phase) { return weights + phase % p.phases * panels * l.panel; };
        const Products q = {l, window + p.stride * top * l.row + shift, weight(phase), panels, rows, pixels, p.kernel,
                            p.stride, bytes, sums + count % l.groups * l.group_sums(), buffer, nullptr,
                            weight(phase + 1), p.phases * panels * l.panel};
        M::multiply_all(q, pending);
        pending.finish();
        pending.set({tile.image, tile.row + top, tile.pixel, rows, pixels}, phase, x_scale, q.sums);
        if (l.groups == 1) pending.finish();
      }
    }
  }
  pending.finish();
}

}  // namespace
}  // namespace sana
