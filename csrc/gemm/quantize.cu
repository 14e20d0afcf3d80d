// Rows of 8-bit values with one scale each, on NVIDIA GPUs, sm_80 and newer.
//
// Algorithm (sana_kernels/gemm/reference.py, to the bit): scale = max |row| / most, values = row * (most / max |row|)
// rounded to nearest even, with most = 127 for int8 and 448 for fp8 (e4m3).
//
// Layouts: x rows of K elements of float, half or bfloat16 at any stride; values (rows, K rounded up to a multiple of
// 64), zeros beyond K; scale (rows) floats.
//
// Tiling: a block per row, which its threads keep in registers (common/rows.cuh): memory is read once.
//
// Bytes: one element read and one byte written per value, 14 MB at 2 x 1024 tokens of K = 2240 in bfloat16, 3 us at
// 4.3 TB/s. FLOPs: 3 per value. Bound by memory.
#include <initializer_list>

#include "common/cuda_status.h"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "gemm/gemm_cuda.h"

namespace sana {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(kMaxRowThreads)
    quantize_kernel(const T* x, int64_t stride, int K, QuantizedRows out) {
  Row<V> row;
  row.load(x + blockIdx.x * stride, K);
  row.store_quantized(blockIdx.x, out, K);
}

template <class T>
cudaError_t run(const Quantize& p, const QuantizedRows& out, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const auto* x = static_cast<const T*>(p.x);
  const dim3 grid(static_cast<unsigned>(p.rows)), block = row_threads(out.width);
  const int K = static_cast<int>(p.K);
  return K % V == 0 && aligned<T, V>(p.x, {p.stride})
             ? launch_kernel<quantize_kernel<T, V>>(grid, block, 0, stream, x, p.stride, K, out)
             : launch_kernel<quantize_kernel<T, 1>>(grid, block, 0, stream, x, p.stride, K, out);
}

}  // namespace

Status quantize_cuda(const Quantize& p, const QuantizedRows& out, void* stream) {
  if (p.rows < 1 || p.K < 1 || p.K > kMaxRow) return Status::bad_shape;
  if (!valid(p.dtype)) return Status::bad_dtype;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::f32) return cuda_status(run<float>(p, out, on));
  if (p.dtype == DType::f16) return cuda_status(run<__half>(p, out, on));
  return cuda_status(run<__nv_bfloat16>(p, out, on));
}

}  // namespace sana
