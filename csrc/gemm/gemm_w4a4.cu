// SVDQuant's matrix product on NVIDIA GPUs with 4-bit tensor cores, sm_80, 86 and 89: 4-bit rows with a scale per group
// of 64, and a low-rank branch in 16 bits, fused.
//
// Algorithm (arXiv 2411.05007; sana_kernels/gemm/int4_reference.py, sana_kernels/quant/formats.py):
//     sums[m][n] = sum over groups g of x_scale[m][g] * weight_scale[n][g] * (sum over k in g of x[m][k] * w[n][k])
//                  + sum over r of low[m][r] * up[n][r]
// then the epilogue (gemm/epilogue.cuh). The sum within a group is exact in int32, over groups it is a float: in half,
// as others accumulate, large scales overflow. low = x down^T, of the unquantised x, is a product of the library: 32
// outputs per token, 3 % of the work.
//
// Layouts: x (M, Kp / 2), weight (N, Kp / 2) bytes, row-major, low nibble first: what mma calls row and column, so
// nothing is packed; scales (rows, Kp / 64) floats; low (M, rank), up (N, rank) half or bfloat16.
//
// Tiling: gemm/tile.cuh. A group is 32 bytes, the K of one mma.m16n8k64, so every mma ends in its own scaling. Scales
// travel with the slabs. The low-rank branch runs through the same loop, with 16-bit mma into the same sums.
//
// Bytes: (M K + N K) / 2, scales an eighth of that, M N elements. Multiply-adds: M N (K + rank). An mma of 8192 of them
// is followed by 16 scalings per lane, with its share of loads about 21 instructions, which are the bound: at M = 2048,
// N = K = 2240, 1.25e6 mma take an A100 (108 multiprocessors, four instructions per cycle each, 1.41 GHz) 43 us,
// against 17 us at its 4-bit rate and 33 us at its int8 rate: groups of 64 cost most of what 4 bits gain, and memory,
// half of int8's, is what remains. From sm_90 on, this mma is a sequence of 200 instructions: there the weight runs
// through gemm_w8a8.cu.
#include "common/cuda_status.h"
#include "common/launch.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/gemm_cuda.h"
#include "gemm/tile.cuh"

namespace sana {
namespace {

struct Scales {
  const float *x, *weight;
  int groups;
};

// Sums of int32 accumulators that start here are the bits of the float 2^23 + 2^22 + sum, while |sum| < 2^22; a group's
// is at most 7 * 7 * 64. It saves the conversion, which runs at a quarter of an addition's rate.
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

// Copies the scales of a slab's two groups for the block's rows: [group][row].
template <int Rows, int Threads>
__device__ void load_scales(float* to, const float* scale, int64_t first, int rows, int group, int groups) {
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * Rows; i += Threads) {
    const int row = i % Rows, g = group + i / Rows;
    const bool inside = first + row < rows && g < groups;
    cp_async<4>(to + i, inside ? scale + (first + row) * groups + g : scale, inside ? 4 : 0);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    gemm_w4a4_kernel(Operand x, Operand weight, Scales scales, Operand low, Operand up, bool low_is_half,
                     Epilogue epilogue) {
  auto* shared = dynamic_shared<uint8_t>();
  const int64_t m = int64_t{blockIdx.x} * T::BM, n = int64_t{blockIdx.y} * T::BN;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kStageScales = 2 * (T::BM + T::BN);
  float* stage_scales = reinterpret_cast<float*>(shared + T::Stages * T::kStageBytes);
  // Of the lane's first output: rows g and g + 8 of a tile, columns 2 t and 2 t + 1 (common/ptx.cuh).
  const int row = warp / T::WarpsN * T::WM + lane / 4, column = warp % T::WarpsN * T::WN + lane % 4 * 2;

  Sums<T, float> sums = {};
  multiply<T>(
      x, weight, m, n, shared,
      [&](int stage, int slab) {
        float* to = stage_scales + stage * kStageScales;
        load_scales<T::BM, T::kThreads>(to, scales.x, m, x.rows, 2 * slab, scales.groups);
        load_scales<T::BN, T::kThreads>(to + 2 * T::BM, scales.weight, n, weight.rows, 2 * slab, scales.groups);
      },
      [&](int stage, int half, int i, int j, const uint32_t (&fx)[4], const WeightFragment& fw) {
        int32_t group[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
        mma_m16n8k64_s4(group, fx, fw.b);
        const float* xs = stage_scales + stage * kStageScales + half * T::BM + row + i * 16;
        const float* ws = stage_scales + stage * kStageScales + 2 * T::BM + half * T::BN + column + j * 8;
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[i][j][r] += (__int_as_float(group[r]) - kMagic) * (xs[r / 2 * 8] * ws[r % 2]);
      });
  __syncthreads();  // the slabs are overwritten
  if (low.data != nullptr) {
    const auto nothing = [](int, int) {};
    if (low_is_half) {
      multiply<T>(low, up, m, n, shared, nothing,
                  [&](int, int, int i, int j, const uint32_t (&fx)[4], const WeightFragment& fw) {
                    mma_m16n8k16_f16(sums[i][j], fx, fw.b);
                  });
    } else {
      multiply<T>(low, up, m, n, shared, nothing,
                  [&](int, int, int i, int j, const uint32_t (&fx)[4], const WeightFragment& fw) {
                    mma_m16n8k16_bf16(sums[i][j], fx, fw.b);
                  });
    }
    __syncthreads();
  }
  finish<T>(epilogue, sums, m, n, shared);
}

template <class T>
cudaError_t run(const GemmW4A4& p, cudaStream_t stream) {
  const Epilogue& e = p.epilogue;
  const auto operand = [](const void* data, int64_t rows, int64_t bytes) {
    return Operand{static_cast<const uint8_t*>(data), bytes, static_cast<int>(rows), static_cast<int>(bytes)};
  };
  const int64_t bytes = p.x.groups * 32;
  const Scales scales = {p.x.scale, p.weight.scale, static_cast<int>(p.x.groups)};
  const dim3 grid(static_cast<unsigned>(ceil_div(e.M, T::BM)), static_cast<unsigned>(ceil_div(e.N, T::BN)));
  const size_t shared = T::Stages * (T::kStageBytes + 2 * (T::BM + T::BN) * sizeof(float));  // 72 KB, or 36
  return launch_kernel<gemm_w4a4_kernel<T>>(
      grid, dim3(T::kThreads), shared, stream, operand(p.x.values, e.M, bytes), operand(p.weight.values, e.N, bytes),
      scales, operand(p.low, e.M, 2 * p.rank), operand(p.up, e.N, 2 * p.rank), p.low_dtype == DType::f16, e);
}

}  // namespace

Status gemm_w4a4_cuda(const GemmW4A4& p, void* stream) {
  const Epilogue& e = p.epilogue;
  if (e.M < 1 || e.N < 1 || e.image < 1 || p.x.groups < 1 || p.x.groups != p.weight.groups) return Status::bad_shape;
  if (p.rank % 8 != 0) return Status::bad_shape;
  if (!valid(e.dtype) || p.low_dtype == DType::f32) return Status::bad_dtype;
  const auto on = static_cast<cudaStream_t>(stream);
  return cuda_status(p.large ? run<Tile<4, 2, 32, 64>>(p, on) : run<Tile<2, 2, 32, 32>>(p, on));
}

}  // namespace sana
