// Vectors of 16 floats from and to tensors of each dtype, for the files compiled for AVX-512 (and nobody else).
//
// No C++ standard header here or there: the linker might keep their AVX-512 copy of a shared inline function for
// everybody.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside gcc 12's own intrinsics
#endif

#include <immintrin.h>
#include <stdint.h>

#include "common/dtype.h"

namespace sana {
namespace {

constexpr int kLanes = 16;

// The mask of the first `count` lanes; all of them for 16 and more.
inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

struct F32 {
  using Type = float;
  static __m512 load(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }
  static void store(float* x, __mmask16 lanes, __m512 y) { _mm512_mask_storeu_ps(x, lanes, y); }
};

struct F16 {
  using Type = uint16_t;
  static __m512 load(const uint16_t* x, __mmask16 lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x)); }
  static void store(uint16_t* x, __mmask16 lanes, __m512 y) {
    _mm256_mask_storeu_epi16(x, lanes, _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct BF16 {
  using Type = uint16_t;
  static __m512 load(const uint16_t* x, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16));
  }
  static void store(uint16_t* x, __mmask16 lanes, __m512 y) {
    _mm256_mask_storeu_epi16(x, lanes, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
  }
};

}  // namespace
}  // namespace sana
