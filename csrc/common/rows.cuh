// One row of a matrix per block of threads, kept in registers between its passes, and its 8-bit form: what modulate and
// quantize share.
//
// Thread t holds V neighbouring values of every blockDim.x * V, 16 in all: pack i begins at channel (i * threads + t) *
// V, so that a warp reads and writes whole lines of memory. V = 16 bytes' worth where rows allow it, else 1.
#pragma once

#include <cuda_fp8.h>

#include "common/cuda_common.cuh"
#include "common/rows_cuda.h"

namespace sana {

constexpr int kRowValues = 16;  // of one thread
constexpr int kMaxRowThreads = static_cast<int>(kMaxRow / kRowValues);

// Threads of a block for rows of `width` values.
inline dim3 row_threads(int64_t width) {
  return dim3(static_cast<unsigned>(ceil_div(ceil_div(width, kRowValues), 32) * 32));
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Largest {
  __device__ float operator()(float a, float b) const { return max(a, b); }
};

// The same sum or largest value in every thread, joined in an order that depends on blockDim alone.
template <class Join>
__device__ float block_reduce(float x, Join join) {
  __shared__ float of_warp[32];
  for (int offset = 16; offset > 0; offset /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, offset));
  __syncthreads();  // a reduction before this one has been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();  // all warps have written
  x = of_warp[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x / 32); ++warp) x = join(x, of_warp[warp]);
  return x;
}

template <int V>
struct Row {
  static constexpr int kPacks = kRowValues / V;
  float x[kPacks][V];

  static __device__ int channel(int pack) { return (pack * static_cast<int>(blockDim.x) + threadIdx.x) * V; }

  // Channels beyond C become 0.
  template <class T>
  __device__ void load(const T* row, int C) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      if (channel(pack) < C) {
        sana::load(row + channel(pack), x[pack]);
      } else {
        for (int i = 0; i < V; ++i) x[pack][i] = 0;
      }
    }
  }

  template <class T>
  __device__ void store(T* row, int C) const {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack)
      if (channel(pack) < C) sana::store(x[pack], row + channel(pack));
  }

  // Calls f(values, channel) for every pack below C, a multiple of V.
  template <class F>
  __device__ void each_pack(int C, F f) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack)
      if (channel(pack) < C) f(x[pack], channel(pack));
  }

  // The sum of f(value) over the first C channels of the row.
  template <class F>
  __device__ float sum(int C, F f) {
    float total = 0;
    each_pack(C, [&](float (&values)[V], int) {
      for (int i = 0; i < V; ++i) total += f(values[i]);
    });
    return block_reduce(total, Add());
  }

  // The row as 8-bit values and their scale, to the bit as sana_kernels/gemm/reference.py says.
  __device__ void store_quantized(int64_t row, const QuantizedRows& out, int C) {
    float largest = 0;
    each_pack(C, [&](float (&values)[V], int) {
      for (int i = 0; i < V; ++i) largest = max(largest, fabsf(values[i]));
    });
    largest = block_reduce(largest, Largest());
    const float most = out.fp8 ? 448.0f : 127.0f;
    const bool zero = largest < 0x1p-100f;
    if (threadIdx.x == 0) out.scale[row] = zero ? 0 : largest / most;
    const float inverse = zero ? 0 : most / largest;
    auto* values = static_cast<uint8_t*>(out.values) + row * out.width;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      if (channel(pack) >= out.width) continue;
      Vector<uint8_t, V> bytes;
      for (int i = 0; i < V; ++i) {
        const float value = min(max(x[pack][i] * inverse, -most), most);
        const int integer = __float2int_rn(value);
        bytes.at[i] = out.fp8 ? __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3) : static_cast<uint8_t>(integer);
      }
      write(bytes, values + channel(pack));
    }
  }
};

// Can rows of T be read V at a time? The address and the strides, in elements, of everything that is read in this way.
template <class T, int V>
bool aligned(const void* data, std::initializer_list<int64_t> strides) {
  bool good = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) good = good && stride % V == 0 && stride * sizeof(T) % 16 == 0;
  return good;
}

}  // namespace sana
