// Matrix product of int8 rows with a scale per token and per output channel, on NVIDIA GPUs, sm_80 and newer.
//
// Algorithm (sana_kernels/gemm/reference.py): sums[m][n] = sum over k of x[m][k] * weight[n][k], exact in int32; then
// the epilogue (gemm/epilogue.cuh), fused. Scales stand outside of the sum over K, so the main loop is nothing but
// integer instructions: scales per group of K would cost a conversion and two float operations per output and group.
//
// Layouts: x (M, K), weight (N, K), row-major with K a multiple of 64: what mma calls row and column. Nothing is
// packed.
//
// Tiling: gemm/tile.cuh, mma.m16n8k32, which every target has (wgmma, sm_90a only, would lift Hopper's bound from about
// 60 % of its int8 rate, and needs other code for everything else). Warps own 32 x 80, 32 x 64, 32 x 48 or 32 x 32
// outputs; per 32 bytes of K a warp of 32 x 80 reads 3.5 KB of shared memory, 28 cycles, for 20 mma, 32 cycles at that
// bound. SANA's N are awkward (2240 = 14 x 160, 1152 = 12 x 96): sana_kernels/gemm/cuda.py picks the tile that leaves
// the fewest multiprocessors idle. The sums are exact, so the result does not depend on it.
//
// Bytes: M K + N K, and M N elements. Multiply-adds: M N K. At M = 2048, N = 2240, K = 5600 with gate and
// residual: 51e9 operations, 54 us at 950e12 per second (60 % of what an H200 does in int8), and 42 MB, 10 us. Bound by
// the tensor cores.
#include <iterator>

#include "common/cuda_status.h"
#include "common/launch.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/gemm_cuda.h"
#include "gemm/tile.cuh"

namespace sana {
namespace {

template <class T>
__global__ void __launch_bounds__(T::kThreads, 2) gemm_w8a8_kernel(Operand x, Operand weight, Epilogue epilogue) {
  auto* shared = dynamic_shared<uint8_t>();
  const int64_t m = int64_t{blockIdx.x} * T::BM, n = int64_t{blockIdx.y} * T::BN;
  Sums<T, int32_t> sums = {};
  multiply<T>(
      x, weight, m, n, shared, [](int, int) {},
      [&](int, int, int i, int j, const uint32_t (&fx)[4], const WeightFragment& fw) {
        mma_m16n8k32_s8(sums[i][j], fx, fw.b);
      });
  __syncthreads();  // the epilogue overwrites the slabs
  finish<T>(epilogue, sums, m, n, shared);
}

template <class T>
cudaError_t run(const GemmW8A8& p, cudaStream_t stream) {
  const Epilogue& e = p.epilogue;
  const auto operand = [&](const void* data, int64_t rows) {
    return Operand{static_cast<const uint8_t*>(data), p.K, static_cast<int>(rows), static_cast<int>(p.K)};
  };
  const dim3 grid(static_cast<unsigned>(ceil_div(e.M, T::BM)), static_cast<unsigned>(ceil_div(e.N, T::BN)));
  return launch_kernel<gemm_w8a8_kernel<T>>(grid, dim3(T::kThreads), T::Stages * T::kStageBytes, stream,
                                            operand(p.x, e.M), operand(p.weight, e.N), e);
}

// TILES of sana_kernels/gemm/cuda.py.
using Run = cudaError_t (*)(const GemmW8A8&, cudaStream_t);
constexpr Run kRuns[] = {run<Tile<4, 2, 32, 80>>, run<Tile<4, 2, 32, 64>>, run<Tile<4, 2, 32, 48>>,
                         run<Tile<2, 2, 32, 32>>};

}  // namespace

Status gemm_w8a8_cuda(const GemmW8A8& p, void* stream) {
  if (p.epilogue.M < 1 || p.epilogue.N < 1 || p.K < 1 || p.K % 64 != 0 || p.epilogue.image < 1)
    return Status::bad_shape;
  if (!valid(p.epilogue.dtype)) return Status::bad_dtype;
  if (p.tile < 0 || p.tile >= static_cast<int>(std::size(kRuns))) return Status::bad_shape;
  return cuda_status(kRuns[p.tile](p, static_cast<cudaStream_t>(stream)));
}

}  // namespace sana
