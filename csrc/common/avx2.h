// Vectors of 8 floats for the files compiled for AVX2 (and nobody else), with the names of avx512.h; see there.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "common/dtype.h"

namespace sana {
namespace {

using Vec = __m256;
using Lanes = int;  // how many lanes, from the first on

constexpr int kLanes = 8;
constexpr Lanes kAllLanes = kLanes;

inline Lanes first_lanes(int64_t count) { return count >= kLanes ? kAllLanes : int(count); }

inline __m256i lane_mask(Lanes lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct F32 {
  using Type = float;
  static Vec load(const float* x, Lanes lanes) {
    return lanes == kAllLanes ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, lane_mask(lanes));
  }
  static void store(float* x, Lanes lanes, Vec y) {
    if (lanes == kAllLanes) return _mm256_storeu_ps(x, y);
    _mm256_maskstore_ps(x, lane_mask(lanes), y);
  }
};

// Eight elements of 16 bits; AVX2 has no masks for them.
inline __m128i load_16bit(const uint16_t* x, Lanes lanes) {
  if (lanes == kAllLanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  uint16_t row[kLanes] = {};
  memcpy(row, x, lanes * sizeof *x);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
}

inline void store_16bit(uint16_t* x, Lanes lanes, __m128i y) {
  if (lanes == kAllLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(x), y);
  uint16_t row[kLanes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(row), y);
  memcpy(x, row, lanes * sizeof *x);
}

struct F16 {
  using Type = uint16_t;
  static Vec load(const uint16_t* x, Lanes lanes) { return _mm256_cvtph_ps(load_16bit(x, lanes)); }
  static void store(uint16_t* x, Lanes lanes, Vec y) {
    store_16bit(x, lanes, _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct BF16 {
  using Type = uint16_t;
  static Vec load(const uint16_t* x, Lanes lanes) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16bit(x, lanes)), 16));
  }
  // To nearest, ties to even; a NaN stays one.
  static void store(uint16_t* x, Lanes lanes, Vec y) {
    const __m256i bits = _mm256_castps_si256(y);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
    store_16bit(x, lanes, _mm_packus_epi32(low, high));
  }
};

inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec sqrt(Vec x) { return _mm256_sqrt_ps(x); }

inline Vec bf16_of_two(Vec x, bool second) {
  const __m256i bits = _mm256_castps_si256(x);
  return _mm256_castsi256_ps(second ? _mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000)))
                                    : _mm256_slli_epi32(bits, 16));
}

inline Vec select(Lanes lanes, Vec x, Vec y) {
  return lanes == kAllLanes ? x : _mm256_blendv_ps(y, x, _mm256_castsi256_ps(lane_mask(lanes)));
}

inline Vec max(Vec low, Vec x) { return _mm256_max_ps(low, x); }
inline Vec min(Vec high, Vec x) { return _mm256_min_ps(high, x); }

inline float sum(Vec x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest(Vec x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Vec magnitude_max(Vec largest, Vec x) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(largest), magnitude));
}

// magnitude_max of `count` values in bfloat16, whose 16 bits are compared.
inline Vec magnitude_max_bf16(Vec largest, const uint16_t* x, int64_t count) {
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 16) {
    uint16_t last[16] = {};
    if (count - i < 16) memcpy(last, x + i, 2 * (count - i));
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(count - i < 16 ? last : x + i));
    most = _mm256_max_epu16(most, _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)));
  }
  const Vec two = _mm256_castsi256_ps(most);
  return magnitude_max(magnitude_max(largest, bf16_of_two(two, true)), bf16_of_two(two, false));
}

inline float largest_magnitude(Vec magnitudes) {
  const __m256i x = _mm256_castps_si256(magnitudes);
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
  return float_from_bits(uint32_t(_mm_cvtsi128_si32(most)));
}

inline int64_t int8_of(Vec x) {
  const __m256i wide = _mm256_cvtps_epi32(x);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return _mm_cvtsi128_si64(_mm_packs_epi16(half, half));
}
inline void store_int8(int8_t* to, Lanes lanes, Vec x) {
  const int64_t bytes = int8_of(x);
  memcpy(to, &bytes, lanes);
}
// Four vectors, one after the other.
inline void store_int8(int8_t* to, const Vec (&x)[4]) {
  const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
  const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(x[2]), _mm256_cvtps_epi32(x[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // lanes interleave
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}
inline void store_uint8(uint8_t* to, Lanes lanes, Vec x) {  // 128 more
  const int64_t bytes = int8_of(x) ^ int64_t(0x8080808080808080);
  memcpy(to, &bytes, lanes);
}

inline void store_int16(int16_t* to, Lanes lanes, Vec x) {
  const __m256i wide = _mm256_cvtps_epi32(x);
  const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  memcpy(to, &narrow, 2 * lanes);
}

inline Vec round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec above_floor(Vec x) { return x - _mm256_floor_ps(x); }

inline Vec times_power_of_2(Vec x, Vec n) {
  const __m256i exponent = _mm256_cvtps_epi32(_mm256_floor_ps(min(set1(128), n)));
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}

inline Vec reciprocal(Vec x) { return set1(1) / x; }
inline Vec reciprocal_16(Vec x) { return set1(1) / x; }

}  // namespace
}  // namespace sana

#include "common/vector.h"
