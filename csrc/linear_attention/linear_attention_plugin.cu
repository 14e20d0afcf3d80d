// ReLU linear attention as three kernels of a TensorRT plugin (export/plugin.py): the device code of
// linear_attention.cuh, which describes it, behind the arguments that TensorRT passes: inputs, integers, outputs.
//
//     state (k, v; N, H, chunk; states)      states (B, H, chunks, 32, 33) float, a block of its own for every chunk
//     sum   (states; chunks; state)          state (B, H, 32, 33) float
//     apply (q, state; N, H, eps; out)       out (B, N, H, 32); eps is a float's bits, for only integers are passed
//
// q, k, v are (B, N, H, 32), contiguous as all tensors between TensorRT's layers. Grids and blocks are those of
// linear_attention.cu, and so are bytes, FLOPs and bounds: a launch each, as there.
#include "linear_attention/linear_attention.cuh"

namespace sana {
namespace {

constexpr int kState = kHead * (kHead + 1);

template <class T>
__device__ View<T> contiguous(const T* data, int N, int H) {
  return {data, int64_t{N} * H * kHead, int64_t{H} * kHead, kHead};
}

template <class T>
__device__ Problem<T> problem(int N, int H, int64_t chunk, int64_t chunks, float* state) {
  Problem<T> p = {};
  p.N = N;
  p.H = H;
  p.D = kHead;
  p.chunk = chunk;
  p.chunks = chunks;
  p.state = state;
  return p;
}

template <class T>
__device__ Problem<T> state_problem(const T* k, const T* v, int N, int H, int chunk, float* states) {
  Problem<T> p = problem<T>(N, H, chunk, gridDim.y, states);
  p.k = contiguous(k, N, H);
  p.v = contiguous(v, N, H);
  return p;
}

template <class T>
__device__ Problem<T> apply_problem(const T* q, const float* state, int N, int H, int eps, T* out) {
  Problem<T> p = problem<T>(N, H, N, 1, const_cast<float*>(state));  // which `apply` only reads
  p.q = contiguous(q, N, H);
  p.eps = __int_as_float(eps);
  p.out = out;
  return p;
}

}  // namespace
}  // namespace sana

using namespace sana;

extern "C" {

__global__ void __launch_bounds__(kThreads)
    sana_linear_attention_sum(const float* states, int chunks, float* state) {
  sum_chunks(states, chunks, kState, state + blockIdx.y * kState);
}

__global__ void __launch_bounds__(32 * kWarps)
    sana_linear_attention_state_bf16(const Bf16* k, const Bf16* v, int N, int H, int chunk, float* states) {
  state_of_chunk_bf16(state_problem(k, v, N, H, chunk, states));
}

__global__ void __launch_bounds__(32 * kWarps)
    sana_linear_attention_apply_bf16(const Bf16* q, const float* state, int N, int H, int eps, Bf16* out) {
  apply_bf16(apply_problem(q, state, N, H, eps, out));
}

__global__ void __launch_bounds__(kThreads, 1)
    sana_linear_attention_state_fp32(const float* k, const float* v, int N, int H, int chunk, float* states) {
  state_of_chunk<float, kHead>(state_problem(k, v, N, H, chunk, states));
}

__global__ void __launch_bounds__(kThreads)
    sana_linear_attention_apply_fp32(const float* q, const float* state, int N, int H, int eps, float* out) {
  apply<float, kHead>(apply_problem(q, state, N, H, eps, out));
}

__global__ void __launch_bounds__(kThreads, 1)
    sana_linear_attention_state_fp16(const __half* k, const __half* v, int N, int H, int chunk, float* states) {
  state_of_chunk<__half, kHead>(state_problem(k, v, N, H, chunk, states));
}

__global__ void __launch_bounds__(kThreads)
    sana_linear_attention_apply_fp16(const __half* q, const float* state, int N, int H, int eps, __half* out) {
  apply<__half, kHead>(apply_problem(q, state, N, H, eps, out));
}

}  // extern "C"
