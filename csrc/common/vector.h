// What avx512.h and avx2.h, which include this at their end, have in common: a loop over a row, exp and SiLU.
#pragma once

namespace sana {
namespace {

// f(i, lanes) for every vector of a row of `count` elements; the last one may have fewer lanes.
template <class F>
inline void for_vectors(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, kAllLanes);
  if (i < count) f(i, first_lanes(count - i));
}

inline Vec magnitude_max(Vec largest, const float* x, int64_t count) {
  for_vectors(count, [&](int64_t i, Lanes lanes) { largest = magnitude_max(largest, F32::load(x + i, lanes)); });
  return largest;
}

// store_int8 for a row, of which f(i, lanes) are the values.
template <class F>
inline __attribute__((always_inline)) void store_int8_row(int8_t* to, int64_t count, F f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    store_int8(to + i, {f(i, kAllLanes), f(i + kLanes, kAllLanes), f(i + 2 * kLanes, kAllLanes),
                        f(i + 3 * kLanes, kAllLanes)});
  for (; i < count; i += kLanes) store_int8(to + i, first_lanes(count - i), f(i, first_lanes(count - i)));
}

// exp and SiLU come in two precisions. Powers of two are exact; between them the polynomials are minimax fits in
// relative error. The bounds were measured against double over all exponents. NaN stays NaN. Arguments are clamped to
// where the result is a normal number, because subnormal ones cost a hundred cycles.

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// The coefficients from the constant up.
template <int kCount>
inline Vec polynomial(const float (&c)[kCount], Vec x) {
  Vec p = set1(c[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) p = fmadd(p, x, set1(c[i]));
  return p;
}

// Relative error at most 3.0e-7, for |x| <= 20 at most 1.2e-7. Beyond [-87, 87]: exp of that end.
//     exp(x) = 2^n p(x - n ln 2), n = round(x / ln 2)
inline Vec exp(Vec x) {
  constexpr float c[] = {1, 1, 0.49999994f, 0.16666521f, 0.041668389f, 0.008368724f, 0.0013814584f};
  x = min(set1(87), max(set1(-87), x));
  const Vec n = round(x * set1(kLog2E));
  return times_power_of_2(polynomial(c, fmadd(n, set1(-kLn2), x)), n);
}

// 2^x for results that are rounded to 16 or 8 bits: relative error at most 8.7e-5. Below -126:
// 2^-126.
inline Vec exp2_16(Vec x) {
  constexpr float c[] = {1, 0.695116758f, 0.227644995f, 0.0770670399f};
  x = max(set1(-126), x);
  return times_power_of_2(polynomial(c, above_floor(x)), x);
}

// x / (1 + exp(-x)); relative error at most 4.1e-7 and, for the second, 1.3e-4. Below -87, where the result is 0 to
// float's precision, the first is x * 1.6e-38.
inline Vec silu(Vec x) { return x / (set1(1) + exp(set1(0) - x)); }
inline Vec silu_16(Vec x) { return x * reciprocal_16(set1(1) + exp2_16(x * set1(-kLog2E))); }

}  // namespace
}  // namespace sana
