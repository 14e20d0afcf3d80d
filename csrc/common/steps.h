// What one step of a small matrix product multiplies in each lane: one float, or a pair of bf16. Either takes 32 bits,
// so the operands of both are arrays of 32-bit units. Include common/avx512.h or common/avx2.h first.
#pragma once

namespace sana {
namespace {

struct FloatStep {
  using Vector = Vec;
  static constexpr int kNumbers = 1;
  static Vector load(const int32_t* x) { return F32::load(reinterpret_cast<const float*>(x), kAllLanes); }
  static Vector broadcast(const int32_t* x) { return set1(float_from_bits(uint32_t(*x))); }
  static Vector one() { return set1(1); }
  static void store(int32_t* to, Vector x) { F32::store(reinterpret_cast<float*>(to), kAllLanes, x); }
  static Vec madd(Vec sum, Vector a, Vector b) { return fmadd(a, b, sum); }
};

#if defined(__AVX512BF16__)
// VDPBF16PS: sum + both products, exact until they are added.
struct PairStep {
  using Vector = __m512i;
  static constexpr int kNumbers = 2;
  static Vector load(const int32_t* x) { return _mm512_loadu_si512(x); }
  static Vector broadcast(const int32_t* x) { return _mm512_set1_epi32(*x); }
  static Vector one() { return _mm512_set1_epi32(0x3f803f80); }
  static void store(int32_t* to, Vector x) { _mm512_storeu_si512(to, x); }
  static Vec madd(Vec sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Lane i: low[i] and high[i], of 16 bits each.
  static Vector interleave(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
};
using StepOf16 = PairStep;  // for operands of 16 bits
#else
using StepOf16 = FloatStep;
#endif

}  // namespace
}  // namespace sana
