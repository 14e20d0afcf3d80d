// What follows a matrix product, fused: out = residual + gate * SiLU(sum * scales + bias), each part where asked for.
//
// mma leaves two neighbouring columns of a row in a thread. A warp passes its sums through shared memory, 16 rows at a
// time, so that a thread gets eight neighbours instead: the bias, gate, residual and result then move in 16 bytes. The
// types of these are known only when the kernel runs: to compile the main loop for each of them would cost minutes, and
// the switch is the same for all threads and outside of that loop.
#pragma once

#include "common/cuda_common.cuh"
#include "gemm/gemm_cuda.h"
#include "gemm/tile.cuh"

namespace sana {

constexpr int kRun = 8;  // neighbouring outputs of a thread

// Values index ... index + 7, of which the first `count` exist; all of them, aligned to their size, where `vectors`.
__device__ inline void load_run(const Values& from, int64_t index, int count, bool vectors, float (&to)[kRun]) {
  const auto read = [&](auto* data) {
    if (vectors) {
      load(data + index, to);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) to[i] = i < count ? to_float(data[index + i]) : 0;
    }
  };
  if (from.dtype == DType::f32) read(static_cast<const float*>(from.data));
  if (from.dtype == DType::f16) read(static_cast<const __half*>(from.data));
  if (from.dtype == DType::bf16) read(static_cast<const __nv_bfloat16*>(from.data));
}

__device__ inline void store_run(const float (&from)[kRun], void* to, DType dtype, int64_t index, int count,
                                 bool vectors) {
  const auto write = [&](auto* data) {
    using T = std::remove_reference_t<decltype(*data)>;
    if (vectors) {
      store(from, data + index);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i)  // not up to `count`, which would move `from` to memory
        if (i < count) data[index + i] = from_float<T>(from[i]);
    }
  };
  if (dtype == DType::f32) write(static_cast<float*>(to));
  if (dtype == DType::f16) write(static_cast<__half*>(to));
  if (dtype == DType::bf16) write(static_cast<__nv_bfloat16*>(to));
}

// Turns the sum of row m, columns n ... n + 7, into outputs and stores them.
__device__ inline void finish_run(const Epilogue& p, float (&y)[kRun], int64_t m, int64_t n) {
  const int count = static_cast<int>(min(p.N - n, int64_t{kRun}));
  float values[kRun];
  if (p.x_scale != nullptr) {
    const float x_scale = p.x_scale[m];
    load_run({p.weight_scale, DType::f32}, n, count, p.vectors, values);
    for (int i = 0; i < kRun; ++i) y[i] *= x_scale * values[i];
  }
  if (p.bias.data != nullptr) {
    load_run(p.bias, n, count, p.vectors, values);
    for (int i = 0; i < kRun; ++i) y[i] += values[i];
  }
  if (p.silu) {
    for (int i = 0; i < kRun; ++i) y[i] = silu(y[i]);
  }
  if (p.residual.data != nullptr) {
    float residual[kRun];
    const int64_t image = m / p.image, row = m % p.image;
    if (p.gate.data != nullptr) {
      load_run(p.gate, image * p.gate_stride + n, count, p.vectors, values);
      for (int i = 0; i < kRun; ++i) y[i] *= values[i];
    }
    load_run(p.residual, image * p.residual_stride[0] + row * p.residual_stride[1] + n, count, p.vectors, residual);
    for (int i = 0; i < kRun; ++i) y[i] += residual[i];
  }
  store_run(y, p.out, p.dtype, m * p.N + n, count, p.vectors);
}

// `shared`: the main loop's, of which all warps have done. m, n: the block's first row and column.
template <class T, class Sum>
__device__ void finish(const Epilogue& p, const Sums<T, Sum>& sums, int64_t m, int64_t n, uint8_t* shared) {
  constexpr int kPitch = T::WN + 8;  // of a row: eight rows' pairs of columns then meet different banks
  static_assert(T::kThreads / 32 * 16 * kPitch * sizeof(float) <= T::Stages * T::kStageBytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* mine = reinterpret_cast<float*>(shared) + warp * 16 * kPitch;
  m += warp / T::WarpsN * T::WM;
  n += warp % T::WarpsN * T::WN;
#pragma unroll
  for (int i = 0; i < T::MT; ++i) {
#pragma unroll
    for (int j = 0; j < T::NT; ++j) {
      for (int r = 0; r < 4; ++r)
        mine[(lane / 4 + r / 2 * 8) * kPitch + j * 8 + lane % 4 * 2 + r % 2] = static_cast<float>(sums[i][j][r]);
    }
    __syncwarp();
    for (int run = lane; run < 16 * T::NT; run += 32) {
      const int row = run / T::NT, column = run % T::NT * kRun;
      if (m + i * 16 + row >= p.M || n + column >= p.N) continue;
      float y[kRun];
      load(mine + row * kPitch + column, y);
      finish_run(p, y, m + i * 16 + row, n + column);
    }
    __syncwarp();
  }
}

}  // namespace sana
