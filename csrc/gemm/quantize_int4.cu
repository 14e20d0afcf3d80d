// Rows of 4-bit values with a scale per group of 64, on NVIDIA GPUs, sm_80 and newer: SVDQuant's activations.
//
// Algorithm (sana_kernels/quant/formats.py, to the bit): x / smooth; scale = max |group| / 7; values = x * (1 / scale)
// rounded to nearest even.
//
// Layouts: x rows of K elements of float, half or bfloat16 at any stride; smooth (K) of any of these; values (rows, Kp
// / 2), the value of even k in the low nibble; scale (rows, Kp / 64); Kp: K rounded up to a multiple of 64.
//
// Tiling: eight lanes share a group, eight values each: the largest is known after three shuffles, memory is read once,
// and a lane writes four bytes.
//
// Bytes: one element read and half a byte written per value, 12 MB at 2 x 1024 tokens of K = 2240 in bfloat16, 3 us at
// 4.3 TB/s. FLOPs: a division and 3 more per value. Bound by memory.
#include "common/cuda_common.cuh"
#include "common/cuda_status.h"
#include "common/launch.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/gemm_cuda.h"

namespace sana {
namespace {

constexpr int kThreads = 256, kGroup = 64, kLanes = kGroup / kRun;

// blockIdx.x: kThreads / kLanes groups of all rows.
__global__ void __launch_bounds__(kThreads) quantize_int4_kernel(QuantizeInt4 p, int groups, bool vectors) {
  const int64_t index = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;  // of the group, over all rows
  const int64_t row = index / groups;
  const int k = static_cast<int>(index % groups * kGroup + threadIdx.x % kLanes * kRun);
  const int count = row < p.rows ? static_cast<int>(min(max(p.K - k, int64_t{0}), int64_t{kRun})) : 0;
  float x[kRun] = {}, smooth[kRun];
  if (count > 0) {
    load_run({p.x, p.dtype}, row * p.stride + k, count, vectors && count == kRun, x);
    if (p.smooth.data != nullptr) {
      load_run(p.smooth, k, count, vectors && count == kRun, smooth);
#pragma unroll
      for (int i = 0; i < kRun; ++i) x[i] = i < count ? x[i] / smooth[i] : 0;
    }
  }
  float largest = 0;
  for (int i = 0; i < kRun; ++i) largest = max(largest, fabsf(x[i]));
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  if (row >= p.rows) return;
  const float scale = largest < 0x1p-100f ? 0 : largest / 7.0f, inverse = scale == 0 ? 0 : 1 / scale;
  uint32_t packed = 0;
  for (int i = 0; i < kRun; ++i) {
    const int value = min(max(__float2int_rn(x[i] * inverse), -7), 7);
    packed |= (static_cast<uint32_t>(value) & 15u) << (4 * i);
  }
  static_cast<uint32_t*>(p.values)[index * kLanes + threadIdx.x % kLanes] = packed;
  if (threadIdx.x % kLanes == 0) p.scale[index] = scale;
}

}  // namespace

Status quantize_int4_cuda(const QuantizeInt4& p, void* stream) {
  if (p.rows < 1 || p.K < 1) return Status::bad_shape;
  if (!valid(p.dtype) || !valid(p.smooth.dtype)) return Status::bad_dtype;
  const auto at_16_bytes = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool vectors = at_16_bytes(p.x) && at_16_bytes(p.smooth.data) && p.stride % kRun == 0;
  const int64_t groups = ceil_div(p.K, kGroup);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows * groups * kLanes, kThreads)));
  return cuda_status(launch_kernel<quantize_int4_kernel>(grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), p,
                                                         static_cast<int>(groups), vectors));
}

}  // namespace sana
