// The inner loop of matrix products in plain C++: one row by 16 columns. For gemm and conv2d.
#pragma once

#include "common/dtype.h"

namespace sana {
namespace {

constexpr int kColumns = 16;

struct Int8 {
  static constexpr bool kScaled = false;
  using Element = int8_t;
  using Sum = int32_t;
  static constexpr int kInner = 4;  // elements of K that lie side by side
  static int32_t weight(int8_t x) { return x; }
  static int32_t value(int8_t x) { return x; }
};

// Chunks of K are summed as integers, and with a scale each as floats.
struct Int16Chunks {
  static constexpr bool kScaled = true;
  using Element = int16_t;
  using Sum = int32_t;
  static constexpr int kInner = 2;
  static int32_t weight(int16_t x) { return x; }
  static int32_t value(int16_t x) { return x; }
};

// x is unsigned, 128 more than its values.
struct Int8Chunks : Int8 {
  static constexpr bool kScaled = true;
  static int32_t value(int8_t x) { return int32_t(uint8_t(x)) - 128; }
};

struct BFloat16 {
  static constexpr bool kScaled = false;
  using Element = uint16_t;
  using Sum = float;
  static constexpr int kInner = 2;
  static float weight(uint16_t x) { return bf16_to_float(x); }
  static float value(uint16_t x) { return bf16_to_float(x); }
};

struct Float {
  static constexpr bool kScaled = false;
  using Element = float;
  using Sum = float;
  static constexpr int kInner = 1;
  static float weight(float x) { return x; }
  static float value(float x) { return x; }
};

// Adds the products of K elements: a row of x, and 16 columns of weights.
template <class T>
inline void multiply(typename T::Sum (&sum)[kColumns], const typename T::Element* x, const typename T::Element* weight,
                     int64_t K) {
  for (int64_t k = 0; k < K; k += T::kInner)
    for (int i = 0; i < kColumns; ++i)
      for (int j = 0; j < T::kInner; ++j)
        sum[i] += T::value(x[k + j]) * T::weight(weight[k * kColumns + i * T::kInner + j]);
}

}  // namespace
}  // namespace sana
