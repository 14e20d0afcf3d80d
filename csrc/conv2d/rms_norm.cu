// RMS norm over the channels of each pixel, then an activation, then a residual, on NVIDIA GPUs, sm_80 and newer; without
// the norm, what follows a library's convolution: bias, activation and residual.
//
// Algorithm (sana_kernels/conv2d/reference.py), in float and rounded once:
//     out = activation(x / sqrt(mean(x^2) + eps) * weight + bias) + residual
//     out = activation(x + bias) + residual                                      where weight is null
//
// Layouts: x, residual, out (B, H, W, C) contiguous, that is rows of C; weight, bias (C); all float, half or bfloat16.
// bias and residual may be null. out may be x: a lane writes what only it reads, after the shuffles of its row.
//
// Tiling: the decoder's rows are short (128 to 1024 channels) and many (a million at 1024 px), so a row belongs to 4 to
// 32 lanes of a warp, as many as it has pieces of 16 bytes: at C = 128 in 16 bits a warp has two rows and no idle lane.
// The sum needs shuffles and no barrier. The second pass over the row finds it in the L1 cache. Without the norm there is
// one pass.
//
// Bytes: 2 or 3 elements per value. FLOPs: about 8 per value. Bound by memory: a residual block's norm at 1024 px (C =
// 128 in bfloat16) moves 805 MB, 190 us at 4.3 TB/s.
#include "common/cuda_common.cuh"
#include "common/cuda_status.h"
#include "common/launch.cuh"
#include "conv2d/conv2d_cuda.h"

namespace sana {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Problem {
  const T *x, *weight, *bias, *residual;
  T* out;
  int64_t rows;
  int C;
  Activation activation;
  float eps;
};

__device__ float activate(float x, Activation activation) {
  if (activation == Activation::silu) return silu(x);
  if (activation == Activation::relu) return x < 0 ? 0 : x;  // a comparison that lets NaN through
  return x;
}

template <class T, int V>
__device__ void load_or(float otherwise, const T* from, int c, float (&to)[V]) {
  if (from != nullptr) return load(from + c, to);
  for (int i = 0; i < V; ++i) to[i] = otherwise;
}

// `lanes`, a power of 2, share a row; each reads V values at a time.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(Problem<T> p, int lanes) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / lanes;
  const int first = threadIdx.x % lanes * V, step = lanes * V;
  const bool inside = row < p.rows;  // all lanes take part in the shuffles
  const T* x = p.x + row * p.C;
  float values[V], inverse = 1;
  if (p.weight != nullptr) {
    float sum = 0;
    for (int c = first; inside && c < p.C; c += step) {
      load(x + c, values);
      for (int i = 0; i < V; ++i) sum += values[i] * values[i];
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    inverse = rsqrtf(sum / p.C + p.eps);
  }
  for (int c = first; inside && c < p.C; c += step) {
    float weight[V], bias[V];
    load(x + c, values);
    load_or(1, p.weight, c, weight);
    load_or(0, p.bias, c, bias);
    for (int i = 0; i < V; ++i) values[i] = activate(values[i] * inverse * weight[i] + bias[i], p.activation);
    if (p.residual != nullptr) {
      float residual[V];
      load(p.residual + row * p.C + c, residual);
      for (int i = 0; i < V; ++i) values[i] += residual[i];
    }
    store(values, p.out + row * p.C + c);
  }
}

template <class T>
cudaError_t run(const RmsNorm& args, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const auto pointer = [](const void* data) { return static_cast<const T*>(data); };
  const Problem<T> p = {pointer(args.x),          pointer(args.weight),      pointer(args.bias),
                        pointer(args.residual),   static_cast<T*>(args.out), args.rows,
                        static_cast<int>(args.C), args.activation,           args.eps};
  bool vectors = args.C % V == 0;
  for (const void* data : {args.x, args.weight, args.bias, args.residual, static_cast<const void*>(args.out)})
    vectors = vectors && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  int lanes = 4;
  while (lanes < 32 && lanes * (vectors ? V : 1) < args.C) lanes *= 2;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.rows * lanes, kThreads)));
  return vectors ? launch_kernel<rms_norm_kernel<T, V>>(grid, dim3(kThreads), 0, stream, p, lanes)
                 : launch_kernel<rms_norm_kernel<T, 1>>(grid, dim3(kThreads), 0, stream, p, lanes);
}

}  // namespace

Status rms_norm_cuda(const RmsNorm& p, void* stream) {
  if (p.rows < 1 || p.C < 1) return Status::bad_shape;
  if (!valid(p.dtype)) return Status::bad_dtype;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::f32) return cuda_status(run<float>(p, on));
  if (p.dtype == DType::f16) return cuda_status(run<__half>(p, on));
  return cuda_status(run<__nv_bfloat16>(p, on));
}

}  // namespace sana
