// The inner loop of matrix products on AMX tiles: 32 rows x 32 columns of sums in tiles 0-3, x in tiles 4 and 5,
// weights in 6 and 7. For gemm, conv2d and attention; include common/avx512.h and common/tiles.h first.
//
// One operand stays in the first-level cache, where a tile load takes 8 cycles; the other streams from the second (19) with
// the non-temporal hint (tileloaddt1), without which it would push the first out.
//
// gcc does not know that a tile load reads memory: after what it reads was written, the caller puts written().
#pragma once

#include "common/integers.h"

namespace sana {
namespace {

constexpr int kRows = 32, kColumns = 32;
constexpr int kSteps = 18;  // of 64 bytes of K, whose 32 rows of x fit the first-level cache

struct Int8 {
  using Sum = int;
  static void product_0() { _tile_dpbssd(0, 4, 6); }
  static void product_1() { _tile_dpbssd(1, 5, 6); }
  static void product_2() { _tile_dpbssd(2, 4, 7); }
  static void product_3() { _tile_dpbssd(3, 5, 7); }
  static Vec load(const Sum* sums) { return _mm512_cvtepi32_ps(_mm512_load_si512(sums)); }
};

struct BFloat16 {
  using Sum = float;
  static void product_0() { _tile_dpbf16ps(0, 4, 6); }
  static void product_1() { _tile_dpbf16ps(1, 5, 6); }
  static void product_2() { _tile_dpbf16ps(2, 4, 7); }
  static void product_3() { _tile_dpbf16ps(3, 5, 7); }
  static Vec load(const Sum* sums) { return _mm512_load_ps(sums); }
};

// Tiles 0-3 to and from 32 rows x 32 columns of sums, whose rows are `stride` bytes apart.
inline void load_sums(const void* sums, int64_t stride) {
  const char* upper = static_cast<const char*>(sums);
  const char* lower = upper + 16 * stride;
  _tile_loadd(0, upper, stride);
  _tile_loadd(1, lower, stride);
  _tile_loadd(2, upper + 64, stride);
  _tile_loadd(3, lower + 64, stride);
}

inline void store_sums(void* sums, int64_t stride) {
  char* upper = static_cast<char*>(sums);
  char* lower = upper + 16 * stride;
  _tile_stored(0, upper, stride);
  _tile_stored(1, lower, stride);
  _tile_stored(2, upper + 64, stride);
  _tile_stored(3, lower + 64, stride);
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void written() { asm volatile("" : : : "memory"); }

enum class Stays { x, weights };

template <bool kStreamed>
inline void load_4(const char* x, int64_t stride) {
  if constexpr (kStreamed) _tile_stream_loadd(4, x, stride);
  else _tile_loadd(4, x, stride);
}
template <bool kStreamed>
inline void load_5(const char* x, int64_t stride) {
  if constexpr (kStreamed) _tile_stream_loadd(5, x, stride);
  else _tile_loadd(5, x, stride);
}
template <bool kStreamed>
inline void load_6(const char* weight) {
  if constexpr (kStreamed) _tile_stream_loadd(6, weight, 64);
  else _tile_loadd(6, weight, 64);
}
template <bool kStreamed>
inline void load_7(const char* weight) {
  if constexpr (kStreamed) _tile_stream_loadd(7, weight, 64);
  else _tile_loadd(7, weight, 64);
}

// Adds `steps` steps of K to tiles 0-3: 32 rows of x, 32 columns of weights, whose two halves are `apart` bytes apart.
template <class T, Stays kStays = Stays::x, class P>
inline void multiply(const char* x, int64_t stride, const char* weight, int64_t apart, int64_t steps, P& pending) {
  constexpr bool kStreamX = kStays == Stays::weights, kStreamWeights = !kStreamX;
  const int rows_per_step = int(ceil_div(kRows, steps));
  for (int64_t step = 0; step < steps; ++step) {
    load_4<kStreamX>(x + 64 * step, stride);
    load_6<kStreamWeights>(weight + 1024 * step);
    T::product_0();
    load_5<kStreamX>(x + 64 * step + 16 * stride, stride);
    T::product_1();
    load_7<kStreamWeights>(weight + 1024 * step + apart);
    T::product_2();
    T::product_3();
    pending.run(rows_per_step);
  }
}

// The same with nothing beside it, of operands that were just written.
template <class T>
inline void multiply(const void* x, int64_t stride, const void* weight, int64_t apart, int64_t steps) {
  struct {
    void run(int) {}
  } nothing;
  written();
  multiply<T>(static_cast<const char*>(x), stride, static_cast<const char*>(weight), apart, steps, nothing);
}

}  // namespace
}  // namespace sana
