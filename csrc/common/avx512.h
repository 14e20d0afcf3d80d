// Vectors of 16 floats for the files compiled for AVX-512 (and nobody else): loads and stores for tensors of each
// dtype, and exp, SiLU and reductions on them. These files are compiled twice, with the instructions for bf16 and without.
//
// avx2.h has the same names for vectors of 8, so a kernel that needs nothing else is written once, as <op>_vector.h,
// and compiled for both. GCC's operators + - * / work on Vec.
//
// No C++ standard header here or there: the linker might keep their AVX-512 copy of a shared inline function for
// everybody.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside gcc 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>
#include <stdint.h>

#include "common/dtype.h"

#if defined(__AVX512BF16__)
#define SANA_AVX512_NAME(op) op##_avx512
#else
#define SANA_AVX512_NAME(op) op##_avx512vnni
#endif

namespace sana {
namespace {

using Vec = __m512;
using Lanes = __mmask16;  // which lanes of a vector take part

constexpr int kLanes = 16;
constexpr Lanes kAllLanes = 0xffff;

// The first `count` lanes; all of them for 16 and more.
inline Lanes first_lanes(int64_t count) { return count >= kLanes ? kAllLanes : Lanes((1u << count) - 1); }

struct F32 {
  using Type = float;
  static Vec load(const float* x, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, x); }
  static void store(float* x, Lanes lanes, Vec y) { _mm512_mask_storeu_ps(x, lanes, y); }
};

struct F16 {
  using Type = uint16_t;
  static Vec load(const uint16_t* x, Lanes lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x)); }
  static __m256i rounded(Vec y) { return _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT); }
  static void store(uint16_t* x, Lanes lanes, Vec y) { _mm256_mask_storeu_epi16(x, lanes, rounded(y)); }
};

struct BF16 {
  using Type = uint16_t;
  static Vec load(const uint16_t* x, Lanes lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16));
  }
#if defined(__AVX512BF16__)
  static __m256i rounded(Vec y) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)); }
#else
  static __m256i rounded(Vec y) {
    const __m512i bits = _mm512_castps_si512(y), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const Lanes nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
#endif
  static void store(uint16_t* x, Lanes lanes, Vec y) { _mm256_mask_storeu_epi16(x, lanes, rounded(y)); }
};

inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec sqrt(Vec x) { return _mm512_sqrt_ps(x); }

// Of lanes that hold two numbers in bfloat16: the first, or the second.
inline Vec bf16_of_two(Vec x, bool second) {
  const __m512i bits = _mm512_castps_si512(x);
  return _mm512_castsi512_ps(second ? _mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000)))
                                    : _mm512_slli_epi32(bits, 16));
}

// x in these lanes, y in the others.
inline Vec select(Lanes lanes, Vec x, Vec y) { return _mm512_mask_mov_ps(y, lanes, x); }

// Where x is NaN: x.
inline Vec max(Vec low, Vec x) { return _mm512_max_ps(low, x); }
inline Vec min(Vec high, Vec x) { return _mm512_min_ps(high, x); }

inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float largest(Vec x) { return _mm512_reduce_max_ps(x); }

// max(|x|, largest) where `largest` holds magnitudes. Their bits are compared as integers, by which a NaN is larger
// than any number and stays.
inline Vec magnitude_max(Vec largest, Vec x) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(largest), magnitude));
}
inline float largest_magnitude(Vec magnitudes) {
  return float_from_bits(uint32_t(_mm512_reduce_max_epi32(_mm512_castps_si512(magnitudes))));
}

// magnitude_max of `count` values in bfloat16, whose 16 bits are compared.
inline Vec magnitude_max_bf16(Vec largest, const uint16_t* x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 lanes = count - i < 32 ? (1u << (count - i)) - 1 : ~0u;
    most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(lanes, x + i), magnitude));
  }
  const Vec two = _mm512_castsi512_ps(most);
  return magnitude_max(magnitude_max(largest, bf16_of_two(two, true)), bf16_of_two(two, false));
}

// To the nearest integer, ties to even, beyond the type to its ends.
inline void store_int8(int8_t* to, Lanes lanes, Vec x) {  // vpmovsdb under a mask to memory is slow on Zen
  _mm_mask_storeu_epi8(to, lanes, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
// Four vectors, one after the other.
inline void store_int8(int8_t* to, const Vec (&x)[4]) {
  const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0]), _mm512_cvtps_epi32(x[1]));
  const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2]), _mm512_cvtps_epi32(x[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // lanes interleave
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
}
inline void store_uint8(uint8_t* to, Lanes lanes, Vec x) {  // 128 more
  const __m128i narrow = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x));
  _mm_mask_storeu_epi8(to, lanes, _mm_xor_si128(narrow, _mm_set1_epi8(-128)));
}
inline void store_int16(int16_t* to, Lanes lanes, Vec x) {
  _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}

inline Vec round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x - floor(x)
inline Vec above_floor(Vec x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

// x 2^floor(n), for n >= -126; from 128 on infinite.
inline Vec times_power_of_2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

// 1 / x, for x and 1 / x in the range of normal floats: to 2 ulp, and to 2^-14 (also for infinity).
inline Vec reciprocal(Vec x) {
  const Vec y = _mm512_rcp14_ps(x);
  return y * _mm512_fnmadd_ps(x, y, set1(2));
}
inline Vec reciprocal_16(Vec x) { return _mm512_rcp14_ps(x); }

}  // namespace
}  // namespace sana

#include "common/vector.h"
