// ReLU linear attention on NVIDIA GPUs, sm_80 and newer: the plain form that faster ones are measured against.
//
// Algorithm, per image and head (D = head dim; arXiv 2410.10629, section 2.2;
// sana_kernels/linear_attention/reference.py):
//     state[j][d] = sum over tokens n of relu(k[n][j]) * v[n][d]      for d < D
//     state[j][D] = sum over tokens n of relu(k[n][j])
//     out[n][d]   = (relu(q[n]) . state[:][d]) / (relu(q[n]) . state[:][D] + eps)
// Kernels: (0) with qk-norm, 1/RMS of every row of q and of k; (1) the state of every chunk of tokens; (2) the sum of
// the chunks and the output. Everything is accumulated in float, in an order that depends only on the shape: no
// atomics.
//
// Layouts: q, k, v (B, N, H, D) of float, half or bfloat16 with any strides, the last one 1, so that a packed QKV
// projection is read in place; out (B, N, H, D) contiguous. Scratch, in floats: the chunks' states, B * H * chunks * D
// * (D + 1), and with qk-norm 1/RMS of the rows of q and k, 2 * B * N.
//
// Tiling: blocks of 16 x 16 threads; W = D rounded up to 16, 32, 64 or 128. (1) one block per chunk (at least 128
// tokens, at most 16 chunks) and head; 32 tokens at a time go through shared memory, each thread owns (W/16)^2 entries
// of the state. (2) one block per 32 tokens and head; the state lies in shared memory, each thread owns 2 * W/16
// outputs.
//
// Bytes: 4 * B * N * H * D elements (read q, k, v; write out), plus the chunk states, which stay in the L2 cache.
// FLOPs: 4 * B * N * H * D * (D + 1). At D = 32 and 2 bytes per element that is 16.5 FLOPs per byte, near the balance
// of a GPU's float units and its memory (H100: 67e12 / 3.35e12 = 20), but each multiply-add here also costs about one
// read of shared memory (W/16 = 2: four reads feed four of them), so shared memory is the expected bound.
#include "common/cuda_common.cuh"
#include "common/cuda_status.h"
#include "common/launch.cuh"
#include "linear_attention/linear_attention.h"

namespace sana {
namespace {

constexpr int kSide = 16;  // threads per block: kSide x kSide
constexpr int kThreads = kSide * kSide;
constexpr int kTokens = 32;  // tokens in shared memory at a time
constexpr int64_t kMinChunk = 128;
constexpr int64_t kMaxChunks = 16;

int64_t chunk_tokens(int64_t tokens) {
  const int64_t wanted = ceil_div(tokens, kMaxChunks);
  return ceil_div(wanted > kMinChunk ? wanted : kMinChunk, kTokens) * kTokens;
}

// A (B, N, H, D) view; the stride of D is 1.
template <class T>
struct View {
  const T* data;
  int64_t batch, token, head;
  __device__ const T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// The (H * D) weight of a qk-norm, in float or in T; null where there is none.
template <class T>
struct Weight {
  const void* data;
  bool is_float;
  __device__ float operator[](int channel) const {
    return is_float ? static_cast<const float*>(data)[channel] : to_float(static_cast<const T*>(data)[channel]);
  }
};

template <class T>
struct Problem {
  View<T> q, k, v;
  T* out;
  Weight<T> q_weight, k_weight;
  float* inverse_rms;  // (2, B, N)
  float* state;        // (B * H, chunks, D, D + 1)
  int64_t B, N, chunk, chunks;
  int H, D;
  float norm_eps, eps;
};

// Reads relu(x), or relu(norm(x)) where there is a weight, of one image and head.
template <class T>
struct Feature {
  const T* x;
  int64_t token;
  Weight<T> weight;
  const float* scale;  // 1/RMS of the image's rows
  int first_channel;

  __device__ float operator()(int64_t n, int d) const {
    float value = to_float(x[n * token + d]);
    if (weight.data != nullptr) value *= scale[n] * weight[first_channel + d];
    return value < 0 ? 0 : value;  // a comparison that lets NaN through
  }
};

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

// Copies tokens [first, first + kTokens) of one head into shared memory as floats, zero beyond `last` and beyond D.
template <int W, class Load>
__device__ void load_tile(float (*tile)[W + 1], int64_t first, int64_t last, int D, Load load) {
  for (int i = threadIdx.x; i < kTokens * W; i += kThreads) {
    const int t = i / W, d = i % W;
    tile[t][d] = first + t < last && d < D ? load(first + t, d) : 0.0f;
  }
}

// Kernel 1. blockIdx.x: image and head, blockIdx.y: chunk. One block per multiprocessor is all that the bounds promise:
// without that, ptxas saves registers for more blocks and spills a few, on some targets.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, 1) state_kernel(Problem<T> p) {
  constexpr int R = W / kSide;
  __shared__ float k[kTokens][W + 1];
  __shared__ float v[kTokens][W + 1];
  const int b = blockIdx.x / p.H, h = blockIdx.x % p.H;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const Feature<T> key_at = {p.k.at(b, h), p.k.token, p.k_weight, p.inverse_rms + (p.B + b) * p.N, h * p.D};
  const T* value_at = p.v.at(b, h);
  const int64_t begin = blockIdx.y * p.chunk, end = min(begin + p.chunk, p.N);

  float acc[R][R] = {}, sum[R] = {};
  for (int64_t first = begin; first < end; first += kTokens) {
    load_tile<W>(k, first, end, p.D, key_at);
    load_tile<W>(v, first, end, p.D, [&](int64_t n, int d) { return to_float(value_at[n * p.v.token + d]); });
    __syncthreads();
    // Sums of sums: one long chain of additions would lose a bit of precision for every four times as many tokens.
    float tile_acc[R][R] = {}, tile_sum[R] = {};
    for (int t = 0; t < kTokens; ++t) {
      float value[R];
      for (int c = 0; c < R; ++c) value[c] = v[t][x + kSide * c];
      for (int r = 0; r < R; ++r) {
        const float key = k[t][y + kSide * r];
        tile_sum[r] += key;
        for (int c = 0; c < R; ++c) tile_acc[r][c] += key * value[c];
      }
    }
    for (int r = 0; r < R; ++r) {
      sum[r] += tile_sum[r];
      for (int c = 0; c < R; ++c) acc[r][c] += tile_acc[r][c];
    }
    __syncthreads();
  }

  float* state = p.state + (blockIdx.x * p.chunks + blockIdx.y) * p.D * (p.D + 1);
  for (int r = 0; r < R; ++r) {
    const int j = y + kSide * r;
    if (j >= p.D) continue;
    for (int c = 0; c < R; ++c)
      if (x + kSide * c < p.D) state[j * (p.D + 1) + x + kSide * c] = acc[r][c];
    if (x == 0) state[j * (p.D + 1) + p.D] = sum[r];
  }
}

// Kernel 2. blockIdx.x: image and head, blockIdx.y: tile of kTokens tokens.
template <class T, int W>
__global__ void __launch_bounds__(kThreads) apply_kernel(Problem<T> p) {
  constexpr int R = W / kSide, S = kTokens / kSide;
  float(*state)[W + 1] = reinterpret_cast<float(*)[W + 1]>(dynamic_shared<float>());  // [D], the sum of k at [..][W]
  float(*q)[W + 1] = state + p.D;                                                     // [kTokens]
  const int b = blockIdx.x / p.H, h = blockIdx.x % p.H;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const int64_t first = int64_t(blockIdx.y) * kTokens;

  const int size = p.D * (p.D + 1);
  const float* partial = p.state + blockIdx.x * p.chunks * size;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    float total = 0;
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) total += partial[chunk * size + i];
    const int j = i / (p.D + 1), d = i % (p.D + 1);
    state[j][d == p.D ? W : d] = total;
  }
  load_tile<W>(q, first, p.N, p.D, Feature<T>{p.q.at(b, h), p.q.token, p.q_weight, p.inverse_rms + b * p.N, h * p.D});
  __syncthreads();

  float numerator[S][R] = {}, denominator[S] = {};
  for (int j = 0; j < p.D; ++j) {
    for (int s = 0; s < S; ++s) {
      const float query = q[y + kSide * s][j];
      denominator[s] += query * state[j][W];
      for (int c = 0; c < R; ++c) numerator[s][c] += query * state[j][x + kSide * c];
    }
  }
  for (int s = 0; s < S; ++s) {
    const int64_t n = first + y + kSide * s;
    if (n >= p.N) continue;
    T* out = p.out + ((b * p.N + n) * p.H + h) * p.D;
    for (int c = 0; c < R; ++c) {
      const int d = x + kSide * c;
      if (d < p.D) out[d] = from_float<T>(numerator[s][c] / (denominator[s] + p.eps));
    }
  }
}

int64_t state_floats(const LinearAttention& args) {
  return args.B * args.H * ceil_div(args.N, chunk_tokens(args.N)) * args.D * (args.D + 1);
}

template <class T, int W>
cudaError_t launch(const Problem<T>& p, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(p.B * p.H);
  cudaError_t error = cudaSuccess;
  if (p.q_weight.data != nullptr || p.k_weight.data != nullptr) {
    const auto blocks = static_cast<unsigned>(ceil_div(p.B * p.N * 32, kThreads));
    error = launch_kernel<inverse_rms_kernel<T>>(dim3(blocks, 2), dim3(kThreads), 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  const auto chunks = static_cast<unsigned>(p.chunks);
  error = launch_kernel<state_kernel<T, W>>(dim3(heads, chunks), dim3(kThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  const auto tiles = static_cast<unsigned>(ceil_div(p.N, kTokens));
  const size_t shared = (p.D + kTokens) * (W + 1) * sizeof(float);  // 81 KB at D = 128
  return launch_kernel<apply_kernel<T, W>>(dim3(heads, tiles), dim3(kThreads), shared, stream, p);
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
