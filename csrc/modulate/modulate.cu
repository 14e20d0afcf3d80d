// Adaptive layer norm, into 16-bit or 8-bit rows, and gated residual, on NVIDIA GPUs, sm_80 and newer.
//
// Algorithm (sana_kernels/modulate/reference.py): per token, in float and rounded once at the end,
//     modulate        y = (x - mean) / sqrt(variance + eps) * (1 + scale) + shift      mean and variance over C
//     quantised       y / (max |y| / 127) as int8, or with 448 as fp8 (e4m3)
//     gate_residual   out = x + gate * y
// The variance is the mean of (x - mean)^2, taken after the mean is known: activations with outliers would cancel in
// E[x^2] - mean^2.
//
// Layouts: x, y (B, N, C) of float, half or bfloat16 with any strides of B and N; shift, scale, gate (B, C) in that
// type or in float; out (B, N, C) contiguous; 8-bit rows (B * N, C rounded up to a multiple of 64) and a float each.
//
// Tiling: a block per token. Its threads keep the row in registers, 16 values each (common/rows.cuh), so that memory is
// read once however many passes there are: three reductions over the block cost two barriers each, and the other blocks
// of the multiprocessor (12 of 160 threads at C = 2240) hide them.
//
// Bytes: modulate 2 B N C elements, or one element and one byte each; gate_residual 3 B N C elements. FLOPs: about 8
// and 2 per element. Both are bound by memory: at 2 x 1024 tokens of C = 2240 in bfloat16 18 MB, 4 us at 4.3 TB/s.
#include <initializer_list>

#include "common/cuda_status.h"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "modulate/modulate_cuda.h"

namespace sana {
namespace {

// One row per image, in T or in float.
template <class T>
struct Rows {
  const void* data;
  int64_t stride;
  bool is_float;

  template <int V>
  __device__ void read(int64_t image, int channel, float (&to)[V]) const {
    const int64_t at = image * stride + channel;
    if (is_float) {
      load(static_cast<const float*>(data) + at, to);
    } else {
      load(static_cast<const T*>(data) + at, to);
    }
  }
};

template <class T>
Rows<T> rows_of(const ImageRows& rows) {
  return {rows.data, rows.stride, rows.dtype == DType::f32};
}

template <class T, int V>
bool aligned(const ImageRows& rows) {
  return rows.dtype == DType::f32 ? sana::aligned<float, V>(rows.data, {rows.stride})
                                  : sana::aligned<T, V>(rows.data, {rows.stride});
}

template <class T>
struct ModulateProblem {
  const T* x;
  int64_t image, token;  // strides
  Rows<T> shift, scale;
  T* out;
  QuantizedRows quantized;
  int64_t N;
  int C;
  float eps;
};

template <class T, int V>
__global__ void __launch_bounds__(kMaxRowThreads) modulate_kernel(ModulateProblem<T> p) {
  const int64_t token = blockIdx.x, b = token / p.N;
  Row<V> row;
  row.load(p.x + b * p.image + token % p.N * p.token, p.C);
  const float mean = row.sum(p.C, [](float x) { return x; }) / p.C;
  const float variance = row.sum(p.C, [&](float x) { return (x - mean) * (x - mean); }) / p.C;
  const float inverse = rsqrtf(variance + p.eps);
  row.each_pack(p.C, [&](float (&x)[V], int channel) {
    float shift[V], scale[V];
    p.shift.read(b, channel, shift);
    p.scale.read(b, channel, scale);
    for (int i = 0; i < V; ++i) x[i] = (x[i] - mean) * inverse * (1 + scale[i]) + shift[i];
  });
  if (p.quantized.values != nullptr) {
    row.store_quantized(token, p.quantized, p.C);
  } else {
    row.store(p.out + token * p.C, p.C);
  }
}

template <class T>
struct GateProblem {
  const T *x, *y;
  int64_t x_image, x_token, y_image, y_token;  // strides
  Rows<T> gate;
  T* out;
  int64_t N;
  int C;
};

template <class T, int V>
__global__ void __launch_bounds__(kMaxRowThreads) gate_residual_kernel(GateProblem<T> p) {
  const int64_t token = blockIdx.x, b = token / p.N, n = token % p.N;
  Row<V> x, y;
  x.load(p.x + b * p.x_image + n * p.x_token, p.C);
  y.load(p.y + b * p.y_image + n * p.y_token, p.C);
#pragma unroll
  for (int pack = 0; pack < Row<V>::kPacks; ++pack) {
    const int channel = Row<V>::channel(pack);
    if (channel >= p.C) continue;
    float gate[V];
    p.gate.read(b, channel, gate);
    for (int i = 0; i < V; ++i) x.x[pack][i] += gate[i] * y.x[pack][i];
  }
  x.store(p.out + token * p.C, p.C);
}

template <class T>
cudaError_t run(const Modulate& p, const QuantizedRows& quantized, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const ModulateProblem<T> problem = {
      static_cast<const T*>(p.x.data), p.x.stride[0], p.x.stride[1], rows_of<T>(p.shift),   rows_of<T>(p.scale),
      static_cast<T*>(p.out),          quantized,     p.N,           static_cast<int>(p.C), p.eps};
  const dim3 grid(static_cast<unsigned>(p.B * p.N));
  const dim3 block = row_threads(quantized.values != nullptr ? quantized.width : p.C);
  const bool vectors = sana::aligned<T, V>(p.x.data, {p.x.stride[0], p.x.stride[1], p.C}) && aligned<T, V>(p.shift) &&
                       aligned<T, V>(p.scale);
  return vectors ? launch_kernel<modulate_kernel<T, V>>(grid, block, 0, stream, problem)
                 : launch_kernel<modulate_kernel<T, 1>>(grid, block, 0, stream, problem);
}

template <class T>
cudaError_t run(const GateResidual& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const GateProblem<T> problem = {static_cast<const T*>(p.x.data),
                                  static_cast<const T*>(p.y.data),
                                  p.x.stride[0],
                                  p.x.stride[1],
                                  p.y.stride[0],
                                  p.y.stride[1],
                                  rows_of<T>(p.gate),
                                  static_cast<T*>(p.out),
                                  p.N,
                                  static_cast<int>(p.C)};
  const dim3 grid(static_cast<unsigned>(p.B * p.N)), block = row_threads(p.C);
  const bool vectors = sana::aligned<T, V>(p.x.data, {p.x.stride[0], p.x.stride[1], p.C}) &&
                       sana::aligned<T, V>(p.y.data, {p.y.stride[0], p.y.stride[1]}) && aligned<T, V>(p.gate);
  return vectors ? launch_kernel<gate_residual_kernel<T, V>>(grid, block, 0, stream, problem)
                 : launch_kernel<gate_residual_kernel<T, 1>>(grid, block, 0, stream, problem);
}

Status check(int64_t B, int64_t N, int64_t C, DType dtype) {
  if (B < 1 || N < 1 || C < 1 || C > kMaxRow) return Status::bad_shape;
  return valid(dtype) ? Status::ok : Status::bad_dtype;
}

}  // namespace

Status modulate_cuda(const Modulate& p, const QuantizedRows& quantized, void* stream) {
  if (const Status status = check(p.B, p.N, p.C, p.dtype); status != Status::ok) return status;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::f32) return cuda_status(run<float>(p, quantized, on));
  if (p.dtype == DType::f16) return cuda_status(run<__half>(p, quantized, on));
  return cuda_status(run<__nv_bfloat16>(p, quantized, on));
}

Status gate_residual_cuda(const GateResidual& p, void* stream) {
  if (const Status status = check(p.B, p.N, p.C, p.dtype); status != Status::ok) return status;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::f32) return cuda_status(run<float>(p, on));
  if (p.dtype == DType::f16) return cuda_status(run<__half>(p, on));
  return cuda_status(run<__nv_bfloat16>(p, on));
}

}  // namespace sana
