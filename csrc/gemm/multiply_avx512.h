// The inner loop of matrix products for AVX-512: dot products of int8 quadruples or int16 pairs (VNNI) or bf16 pairs
// (BF16, or widened), or floats, 16 columns per vector. For gemm and conv2d; include common/avx512.h first.
//
// Per type: Sum, a vector of sums; `weights` loads 4 bytes of K of 16 columns, `dot` multiplies them by a row's 4
// bytes; `result` turns a sum into floats, given the row's `correction`. `add` adds the sum of a part of K to others,
// `start` is what such a sum starts with, where that is not zero; kWidened says whether an operand becomes two.
//
// vpdpbusd multiplies unsigned by signed bytes. The weights of Int8 become unsigned by flipping their top bit, that is
// by adding 128, and 128 * sum(x) is taken off the result.
#pragma once

namespace sana {
namespace {

struct Int8 {
  static constexpr bool kScaled = false, kWidened = false;
  // The type that the instruction computes in: with __m512i, gcc 12 copies the sums about inside the loop.
  typedef int Sum __attribute__((vector_size(64)));
  static __m512i weights(const char* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
  static Sum dot(Sum sum, __m512i weights, __m512i x) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, weights, x);
  }
  static __m512 result(Sum sum, int correction) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)sum, _mm512_set1_epi32(correction)));
  }
  // 128 * sum(x) of a row.
  static int correction(const char* x, int64_t bytes) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < bytes; k += 64)
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(x + k));
    return 128 * _mm512_reduce_add_epi32(sum);
  }
};

// Chunks of K are summed as integers, and with a scale each as floats.
struct Chunks {
  static constexpr bool kScaled = true;
  typedef int Sum __attribute__((vector_size(64)));
  static __m512i weights(const char* p) { return _mm512_loadu_si512(p); }
  static __m512 add(__m512 chunks, Sum sum, float scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sum), _mm512_set1_ps(scale), chunks);
  }
};

struct Int16Chunks : Chunks {
  static Sum dot(Sum sum, __m512i weights, __m512i x) {
    return (Sum)_mm512_dpwssd_epi32((__m512i)sum, weights, x);
  }
};

// x is unsigned, 128 more than its values; sums start with what that adds, negative.
struct Int8Chunks : Chunks {
  static Sum start(const char* p) { return (Sum)_mm512_loadu_si512(p); }
  static Sum dot(Sum sum, __m512i weights, __m512i x) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, x, weights);
  }
};

struct BFloat16 {
  static constexpr bool kScaled = false;
  typedef __m512 Sum;
  static __m512i weights(const char* p) { return _mm512_loadu_si512(p); }
#if defined(__AVX512BF16__)
  static constexpr bool kWidened = false;
  static Sum dot(Sum sum, __m512i weights, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x); }
#else
  static constexpr bool kWidened = true;  // once each in a loop over rows and vectors, which compilers see
  static Sum dot(Sum sum, __m512i weights, __m512i x) {
    const Vec w = _mm512_castsi512_ps(weights), y = _mm512_castsi512_ps(x);
    return fmadd(bf16_of_two(w, true), bf16_of_two(y, true), fmadd(bf16_of_two(w, false), bf16_of_two(y, false), sum));
  }
#endif
  static __m512 result(Sum sum, int) { return sum; }
  static int correction(const char*, int64_t) { return 0; }
};

// Here x is broadcast as 4 bytes, whatever they are.
struct Float {
  static constexpr bool kScaled = false;
  typedef __m512 Sum;
  static __m512i weights(const char* p) { return _mm512_loadu_si512(p); }
  static Sum dot(Sum sum, __m512i weights, __m512i x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(weights), _mm512_castsi512_ps(x), sum);
  }
  static __m512 add(__m512 parts, Sum sum, float) { return parts + sum; }
  static __m512 result(Sum sum, int) { return sum; }
  static int correction(const char*, int64_t) { return 0; }
};

inline __m512i broadcast(const char* x) {
  int value;
  __builtin_memcpy(&value, x, sizeof value);
  return _mm512_set1_epi32(value);
}

// Adds the products of `bytes` of K: R rows of x, V vectors of columns, whose weights are `apart` bytes apart. Meanwhile
// 16 * bytes from `next` on come into the second-level cache.
template <class T, int R, int V>
inline void multiply(typename T::Sum (&sum)[R][V], const char* x, int64_t stride, const char* weight, int64_t apart,
                     int64_t bytes, const char* next = nullptr) {
#pragma GCC unroll 4  // 1 to 8 % of products in int8, int16 and fp32
  for (int64_t k = 0; k < bytes; k += 4) {
    if (next != nullptr) _mm_prefetch(next + 16 * k, _MM_HINT_T1);
    __m512i w[V];
    for (int v = 0; v < V; ++v) w[v] = T::weights(weight + v * apart + k * 16);
    for (int r = 0; r < R; ++r) {
      const __m512i four = broadcast(x + r * stride + k);
      for (int v = 0; v < V; ++v) sum[r][v] = T::dot(sum[r][v], w[v], four);
    }
  }
}

}  // namespace
}  // namespace sana
