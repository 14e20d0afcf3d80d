// The element types of tensors, and rows of them to and from float in portable C++.
//
// Everything here is `static`: files compiled for different instruction sets include it, and an ordinary inline
// function would be merged by the linker into one copy, possibly one that the running processor cannot execute.
#pragma once

#include <stdint.h>
#include <string.h>

namespace sana {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };  // DTYPE_CODES of sana_kernels/backend.py

static inline bool valid(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }
static inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Address of element `index` of a tensor.
static inline const char* at(const void* data, int64_t index, DType dtype) {
  return static_cast<const char*>(data) + index * element_size(dtype);
}
static inline char* at(void* data, int64_t index, DType dtype) {
  return static_cast<char*>(data) + index * element_size(dtype);
}

static inline float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t bits_from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float bf16_to_float(uint16_t x) { return float_from_bits(uint32_t(x) << 16); }

// To nearest, ties to even; a NaN stays one.
static inline uint16_t bf16_from_float(float x) {
  const uint32_t bits = bits_from_float(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Exponent and mantissa of a half, moved into a float's fields, are the number times 2^-112, subnormals included.
static inline float f16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float scaled = float_from_bits(magnitude << 13) * 0x1p112f;
  return float_from_bits(sign | bits_from_float(scaled));
}

// To nearest, ties to even; beyond 65504 to infinity; a NaN stays one.
static inline uint16_t f16_from_float(float x) {
  const uint32_t bits = bits_from_float(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return sign | uint16_t(bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u);
  return sign | uint16_t((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}

static inline void load_row(const void* from, DType dtype, int64_t count, float* to) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  if (dtype == DType::f32) memcpy(to, from, count * sizeof(float));
  if (dtype == DType::f16)
    for (int64_t i = 0; i < count; ++i) to[i] = f16_to_float(half[i]);
  if (dtype == DType::bf16)
    for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(half[i]);
}

static inline void store_row(const float* from, DType dtype, int64_t count, void* to) {
  uint16_t* half = static_cast<uint16_t*>(to);
  if (dtype == DType::f32) memcpy(to, from, count * sizeof(float));
  if (dtype == DType::f16)
    for (int64_t i = 0; i < count; ++i) half[i] = f16_from_float(from[i]);
  if (dtype == DType::bf16)
    for (int64_t i = 0; i < count; ++i) half[i] = bf16_from_float(from[i]);
}

}  // namespace sana
