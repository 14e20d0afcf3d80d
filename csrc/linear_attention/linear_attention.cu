// The launches of ReLU linear attention on NVIDIA GPUs: how many chunks and blocks, and which kernels. They are described,
// with their layouts, tiling, bytes and FLOPs, in linear_attention.cuh.
#include "linear_attention/linear_attention.cuh"

#include "common/cuda_status.h"
#include "linear_attention/linear_attention.h"

namespace sana {
namespace {

constexpr int64_t kMinChunk = 128;
constexpr int64_t kMaxChunks = 16;

int64_t chunk_tokens(int64_t tokens) {
  const int64_t wanted = ceil_div(tokens, kMaxChunks);
  return ceil_div(wanted > kMinChunk ? wanted : kMinChunk, kTokens) * kTokens;
}

// Kernel 0. One warp per row; blockIdx.y: 0 q, 1 k.
template <class T>
__global__ void __launch_bounds__(kThreads) inverse_rms_kernel(Problem<T> p) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (row >= p.B * p.N) return;
  const View<T>& view = blockIdx.y == 0 ? p.q : p.k;
  const T* x = view.at(row / p.N, 0) + row % p.N * view.token;
  float sum = 0;
  for (int channel = threadIdx.x % 32; channel < p.H * p.D; channel += 32) {
    const float value = to_float(x[channel / p.D * view.head + channel % p.D]);
    sum += value * value;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) p.inverse_rms[blockIdx.y * p.B * p.N + row] = rsqrtf(sum / (p.H * p.D) + p.norm_eps);
}

// One block per multiprocessor is all that the bounds promise: without that, ptxas saves registers for more blocks and
// spills a few, on some targets.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, 1) state_kernel(Problem<T> p) {
  state_of_chunk<T, W>(p);
}

// In place: what is written is the thread's own element of the first chunk, which it has read.
__global__ void __launch_bounds__(kThreads) sum_kernel(float* state, int64_t chunks, int size) {
  sum_chunks(state, chunks, size, state + blockIdx.y * chunks * size);
}

template <class T, int W>
__global__ void __launch_bounds__(kThreads) apply_kernel(Problem<T> p) {
  apply<T, W>(p);
}

__global__ void __launch_bounds__(32 * kWarps) state_bf16_kernel(Problem<Bf16> p) { state_of_chunk_bf16(p); }

__global__ void __launch_bounds__(32 * kWarps) apply_bf16_kernel(Problem<Bf16> p) { apply_bf16(p); }

// Can rows of a head be read 16 bytes at a time?
bool aligned(const View<Bf16>& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (view.batch | view.token | view.head) % 8 == 0;
}

int64_t state_floats(const LinearAttention& args) {
  return args.B * args.H * ceil_div(args.N, chunk_tokens(args.N)) * args.D * (args.D + 1);
}

// Kernels 1 to 3; `state` and `apply` launch theirs.
template <class T, class State, class Apply>
cudaError_t launch_all(const Problem<T>& p, cudaStream_t stream, State state, Apply apply) {
  cudaError_t error = state();
  if (error != cudaSuccess) return error;
  if (p.chunks > 1) {
    const int size = p.D * (p.D + 1);
    const dim3 grid(static_cast<unsigned>(ceil_div(size, kThreads)), static_cast<unsigned>(p.B * p.H));
    error = launch_kernel<sum_kernel>(grid, dim3(kThreads), 0, stream, p.state, p.chunks, size);
    if (error != cudaSuccess) return error;
  }
  return apply();
}

template <class T, int W>
cudaError_t launch(const Problem<T>& p, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(p.B * p.H), chunks = static_cast<unsigned>(p.chunks);
  const auto tiles = static_cast<unsigned>(ceil_div(p.N, kTokens));
  const size_t shared = (p.D + kTokens) * (W + 1) * sizeof(float);  // 81 KB at D = 128
  const dim3 block(kThreads);
  return launch_all(
      p, stream, [&] { return launch_kernel<state_kernel<T, W>>(dim3(heads, chunks), block, 0, stream, p); },
      [&] { return launch_kernel<apply_kernel<T, W>>(dim3(heads, tiles), block, shared, stream, p); });
}

cudaError_t launch_bf16(const Problem<Bf16>& p, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(p.B * p.H), chunks = static_cast<unsigned>(p.chunks);
  const auto tiles = static_cast<unsigned>(ceil_div(p.N, 16 * kWarps * kWarpTiles));
  const dim3 block(32 * kWarps);
  return launch_all(
      p, stream, [&] { return launch_kernel<state_bf16_kernel>(dim3(heads, chunks), block, 0, stream, p); },
      [&] { return launch_kernel<apply_bf16_kernel>(dim3(heads, tiles), block, 0, stream, p); });
}

template <class T>
cudaError_t run(const LinearAttention& args, float* scratch, cudaStream_t stream) {
  const auto view = [](const void* data, const int64_t* strides) {
    return View<T>{static_cast<const T*>(data), strides[0], strides[1], strides[2]};
  };
  const auto weight = [](const void* data, DType dtype) { return Weight<T>{data, dtype == DType::f32}; };
  Problem<T> p;
  p.q = view(args.q, args.q_stride);
  p.k = view(args.k, args.k_stride);
  p.v = view(args.v, args.v_stride);
  p.out = static_cast<T*>(args.out);
  p.q_weight = weight(args.q_norm, args.q_norm_dtype);
  p.k_weight = weight(args.k_norm, args.k_norm_dtype);
  p.B = args.B;
  p.N = args.N;
  p.H = static_cast<int>(args.H);
  p.D = static_cast<int>(args.D);
  p.chunk = chunk_tokens(p.N);
  p.chunks = ceil_div(p.N, p.chunk);
  p.state = scratch;
  p.inverse_rms = scratch + state_floats(args);
  p.norm_eps = args.norm_eps;
  p.eps = args.eps;
  if (p.q_weight.data != nullptr || p.k_weight.data != nullptr) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.B * p.N * 32, kThreads)), 2);
    const cudaError_t error = launch_kernel<inverse_rms_kernel<T>>(grid, dim3(kThreads), 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  if constexpr (std::is_same_v<T, Bf16>) {
    if (p.D == kHead && aligned(p.q) && aligned(p.k) && aligned(p.v)) return launch_bf16(p, stream);
  }
  if (p.D <= 16) return launch<T, 16>(p, stream);
  if (p.D <= 32) return launch<T, 32>(p, stream);
  if (p.D <= 64) return launch<T, 64>(p, stream);
  return launch<T, 128>(p, stream);
}

}  // namespace

int64_t linear_attention_cuda_scratch(const LinearAttention& args) {
  const bool norm = args.q_norm != nullptr || args.k_norm != nullptr;
  return state_floats(args) + (norm ? 2 * args.B * args.N : 0);
}

Status linear_attention_cuda(const LinearAttention& args, float* scratch, void* stream) {
  if (const Status status = check(args); status != Status::ok) return status;
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::f32) return cuda_status(run<float>(args, scratch, on));
  if (args.dtype == DType::f16) return cuda_status(run<__half>(args, scratch, on));
  return cuda_status(run<__nv_bfloat16>(args, scratch, on));
}

}  // namespace sana
