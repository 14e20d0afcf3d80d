// What every CUDA kernel shares: element types, loads and stores in float, and the status of a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sana {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float(float x) {
  return x;
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

// x / (1 + exp(-x)); the quick division is within 2 ulp, and gives 0 where exp(-x) is beyond 2^126.
__device__ inline float silu(float x) { return __fdividef(x, 1 + expf(-x)); }

// V elements, read and written in accesses of up to 16 bytes: the address is a multiple of that size.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vector {
  T at[V];
};

// Compilers split the copy of an array of halves or bytes; integers of its size they do not.
template <class T, int V>
__device__ inline void write(const Vector<T, V>& from, T* to) {
  constexpr int size = sizeof(from);
  if constexpr (size % 16 == 0) {
    for (int i = 0; i < size / 16; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&from)[i];
  } else if constexpr (size == 8) {
    *reinterpret_cast<uint2*>(to) = reinterpret_cast<const uint2&>(from);
  } else {
    *reinterpret_cast<Vector<T, V>*>(to) = from;
  }
}

template <class T, int V>
__device__ inline void load(const T* from, float (&to)[V]) {
  const Vector<T, V> vector = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = to_float(vector.at[i]);
}

template <class T, int V>
__device__ inline void store(const float (&from)[V], T* to) {
  Vector<T, V> vector;
#pragma unroll
  for (int i = 0; i < V; ++i) vector.at[i] = from_float<T>(from[i]);
  write(vector, to);
}

__device__ inline float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sana
