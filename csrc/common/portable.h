// "Vectors" of one float in plain C++, with the names of avx512.h, so that a kernel written once for vectors also serves
// the portable tier.
#pragma once

#include <math.h>
#include <stdint.h>

#include "common/dtype.h"

namespace sana {
namespace {

using Vec = float;
using Lanes = int;  // of which there is one

constexpr int kLanes = 1;
constexpr Lanes kAllLanes = 1;

struct F32 {
  using Type = float;
  static Vec load(const float* x, Lanes) { return *x; }
  static void store(float* x, Lanes, Vec y) { *x = y; }
};

struct F16 {
  using Type = uint16_t;
  static Vec load(const uint16_t* x, Lanes) { return f16_to_float(*x); }
  static void store(uint16_t* x, Lanes, Vec y) { *x = f16_from_float(y); }
};

struct BF16 {
  using Type = uint16_t;
  static Vec load(const uint16_t* x, Lanes) { return bf16_to_float(*x); }
  static void store(uint16_t* x, Lanes, Vec y) { *x = bf16_from_float(y); }
};

inline Vec set1(float x) { return x; }
inline Vec fmadd(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec sqrt(Vec x) { return sqrtf(x); }
inline Vec bf16_of_two(Vec x, bool second) {
  return float_from_bits(second ? bits_from_float(x) & 0xffff0000u : bits_from_float(x) << 16);
}
inline Vec max(Vec low, Vec x) { return low > x ? low : x; }  // where x is NaN: x
inline float sum(Vec x) { return x; }

// As in avx512.h: a NaN is larger than any number.
inline Vec magnitude_max(Vec largest, Vec x) {
  const uint32_t magnitude = bits_from_float(x) & 0x7fffffffu;
  return magnitude > bits_from_float(largest) ? float_from_bits(magnitude) : largest;
}
inline Vec magnitude_max_bf16(Vec largest, const uint16_t* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) largest = magnitude_max(largest, bf16_to_float(x[i]));
  return largest;
}
inline float largest_magnitude(Vec magnitudes) { return magnitudes; }

// To the nearest integer, ties to even; x lies in the type's range or is NaN.
inline void store_int8(int8_t* to, Lanes, Vec x) { *to = x == x ? int8_t(lrintf(x)) : int8_t(0); }
inline void store_uint8(uint8_t* to, Lanes, Vec x) { *to = uint8_t(x == x ? 128 + lrintf(x) : 128); }  // 128 more
inline void store_int16(int16_t* to, Lanes, Vec x) { *to = x == x ? int16_t(lrintf(x)) : int16_t(0); }

inline Vec silu(Vec x) { return x / (1 + expf(-x)); }
inline Vec silu_16(Vec x) { return silu(x); }

template <class F>
inline void for_vectors(int64_t count, F f) {
  for (int64_t i = 0; i < count; ++i) f(i, kAllLanes);
}

inline Vec magnitude_max(Vec largest, const float* x, int64_t count) {
  for_vectors(count, [&](int64_t i, Lanes lanes) { largest = magnitude_max(largest, F32::load(x + i, lanes)); });
  return largest;
}

template <class F>
inline void store_int8_row(int8_t* to, int64_t count, F f) {
  for_vectors(count, [&](int64_t i, Lanes lanes) { store_int8(to + i, lanes, f(i, lanes)); });
}

}  // namespace
}  // namespace sana
