// ReLU linear attention on NVIDIA GPUs, sm_80 and newer.
//
// Algorithm, per image and head (D = head dim; arXiv 2410.10629, section 2.2;
// sana_kernels/linear_attention/reference.py):
//     state[j][d] = sum over tokens n of relu(k[n][j]) * v[n][d]      for d < D
//     state[j][D] = sum over tokens n of relu(k[n][j])
//     out[n][d]   = (relu(q[n]) . state[:][d]) / (relu(q[n]) . state[:][D] + eps)
// Kernels: (0) with qk-norm, 1/RMS of every row of q and of k; (1) the state of every chunk of tokens; (2) the sum of
// the chunks; (3) the output. (1) and (3) exist twice: for bfloat16 with D = 32, SANA's, on tensor cores, and plainly
// for everything else. Everything is accumulated in float, in an order that depends only on the shape: no atomics.
//
// Layouts: q, k, v (B, N, H, D) of float, half or bfloat16 with any strides, the last one 1, so that a packed QKV
// projection is read in place; out (B, N, H, D) contiguous. Scratch, in floats: the chunks' states, B * H * chunks * D
// * (D + 1), and with qk-norm 1/RMS of the rows of q and k, 2 * B * N.
//
// Tiling, plain: blocks of 16 x 16 threads; W = D rounded up to 16, 32, 64 or 128. (1) one block per chunk (at least
// 128 tokens, at most 16 chunks) and head; 32 tokens at a time go through shared memory, each thread owns (W/16)^2
// entries of the state. (3) one block per 32 tokens and head; the state lies in shared memory, each thread owns 2 *
// W/16 outputs.
//
// Tiling, tensor cores: (1) the same chunks; each of four warps brings 32 tokens at a time to its own shared memory,
// the next ones while it multiplies the transposes of these, so that no barrier stands in the loop; the four states are
// added at the end. (3) a warp keeps the state in registers, as mma's right-hand side, and goes through four
// tiles of 16 tokens. A sum over j may run in any order and columns may lie anywhere, so lane t of four takes q's
// channels 8 t ... 8 t + 7 and makes the same ones of the output: 16 bytes each, straight between memory and registers.
// Precision: relu(k) and v are bfloat16 as they come, so their products are exact. What is not, a normed q or k and the
// state, is split into two bfloat16, whose sum has 16 bits, and products of both parts are added.
//
// Bytes: 4 * B * N * H * D elements (read q, k, v; write out), plus the chunk states, which stay in the L2 cache.
// FLOPs: 4 * B * N * H * D * (D + 1). At D = 32 and 2 bytes per element that is 16.5 FLOPs per byte. On tensor cores
// memory is the bound: 2 x 1024 tokens of 70 heads 37 MB, 9 us at 4.3 TB/s. Plainly, near the balance of a GPU's float
// units and its memory (H100: 67e12 / 3.35e12 = 20), each multiply-add also costs about one read of shared memory (W/16
// = 2: four reads feed four of them), so that shared memory is the bound, at about 50 us.
//
// This file holds kernels 1 to 3 as device functions. linear_attention.cu makes kernels of them and launches those,
// linear_attention_plugin.cu kernels with the arguments that a TensorRT plugin passes.
#pragma once

#include <type_traits>

#include "common/cuda_common.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace sana {
namespace {

constexpr int kSide = 16;  // threads per block: kSide x kSide
constexpr int kThreads = kSide * kSide;
constexpr int kTokens = 32;  // tokens in shared memory at a time

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

// Copies tokens [first, first + kTokens) of one head into shared memory as floats, zero beyond `last` and beyond D.
template <int W, class Load>
__device__ void load_tile(float (*tile)[W + 1], int64_t first, int64_t last, int D, Load load) {
  for (int i = threadIdx.x; i < kTokens * W; i += kThreads) {
    const int t = i / W, d = i % W;
    tile[t][d] = first + t < last && d < D ? load(first + t, d) : 0.0f;
  }
}

// Kernel 1. blockIdx.x: image and head, blockIdx.y: chunk.
template <class T, int W>
__device__ void state_of_chunk(const Problem<T>& p) {
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

// Kernel 2. The sum of a head's chunks; `out` may be the first of them. blockIdx.y: image and head.
__device__ void sum_chunks(const float* state, int64_t chunks, int size, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= size) return;
  const float* of_head = state + blockIdx.y * chunks * size;
  float total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += of_head[chunk * size + i];
  out[i] = total;
}

// Kernel 3. blockIdx.x: image and head, blockIdx.y: tile of kTokens tokens.
template <class T, int W>
__device__ void apply(const Problem<T>& p) {
  constexpr int R = W / kSide, S = kTokens / kSide;
  float (*state)[W + 1] = reinterpret_cast<float (*)[W + 1]>(dynamic_shared<float>());  // [D], the sum of k at [..][W]
  float (*q)[W + 1] = state + p.D;                                                      // [kTokens]
  const int b = blockIdx.x / p.H, h = blockIdx.x % p.H;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const int64_t first = int64_t(blockIdx.y) * kTokens;

  const int size = p.D * (p.D + 1);
  const float* sum = p.state + blockIdx.x * p.chunks * size;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const int j = i / (p.D + 1), d = i % (p.D + 1);
    state[j][d == p.D ? W : d] = sum[i];
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

// ---- bfloat16 and D = 32, on tensor cores

constexpr int kHead = 32;        // D
constexpr int kRow = 2 * kHead;  // bytes of a token's row of one head
constexpr int kWarps = 4;
constexpr int kWarpTokens = 32;  // in a warp's shared memory at a time
constexpr int kWarpTiles = 4;    // of 16 tokens, of which a warp makes the outputs
using Bf16 = __nv_bfloat16;
using Pair = __nv_bfloat162;

// Two floats as bfloat16, the first in the low half, and what the rounding left of them.
struct Split {
  uint32_t high, low;
  __device__ Split(float first, float second) {
    const Pair rounded = __floats2bfloat162_rn(first, second);
    const Pair rest = __floats2bfloat162_rn(first - __low2float(rounded), second - __high2float(rounded));
    high = reinterpret_cast<const uint32_t&>(rounded);
    low = reinterpret_cast<const uint32_t&>(rest);
  }
};

__device__ float low_half(uint32_t pair) { return __low2float(reinterpret_cast<const Pair&>(pair)); }
__device__ float high_half(uint32_t pair) { return __high2float(reinterpret_cast<const Pair&>(pair)); }
__device__ float relu(float x) { return x < 0 ? 0 : x; }  // a comparison that lets NaN through

// The byte of a piece of 16 bytes in shared rows of 64: the eight rows of an ldmatrix meet eight different banks.
__device__ int piece_at(int row, int piece) { return row * kRow + (piece ^ (row / 2 % 4)) * 16; }

// Kernel 1. blockIdx as in state_kernel.
__device__ void state_of_chunk_bf16(const Problem<Bf16>& p) {
  constexpr int kTile = kWarpTokens * kRow;  // bytes; a stage has one of k and one of v
  __shared__ __align__(16) unsigned char memory[kWarps][2][2 * kTile];
  const int b = blockIdx.x / p.H, h = blockIdx.x % p.H;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const Bf16 *k = p.k.at(b, h), *v = p.v.at(b, h);
  const float* inverse_rms = p.inverse_rms + (p.B + b) * p.N;
  const bool normed = p.k_weight.data != nullptr;
  float weight[2][2] = {};  // of channels 16 i + 8 r + g
  for (int i = 0; i < 2; ++i) {
    for (int r = 0; r < 2; ++r) weight[i][r] = normed ? p.k_weight[h * kHead + 16 * i + 8 * r + g] : 1;
  }
  const int64_t begin = blockIdx.y * p.chunk, end = min(begin + p.chunk, p.N);
  const auto first_of = [&](int tile) { return begin + (int64_t{tile} * kWarps + warp) * kWarpTokens; };
  const auto fetch = [&](int tile) {
    for (int i = lane; i < kWarpTokens * 4; i += 32) {
      const int64_t n = first_of(tile) + i / 4;
      unsigned char* to = memory[warp][tile % 2] + piece_at(i / 4, i % 4);
      cp_async<16>(to, n < end ? k + n * p.k.token + i % 4 * 8 : k, n < end ? 16 : 0);
      cp_async<16>(to + kTile, n < end ? v + n * p.v.token + i % 4 * 8 : v, n < end ? 16 : 0);
    }
    cp_async_commit();
  };

  float state[2][4][4] = {}, sum[2][4] = {};  // tiles of 16 j by 8 d; every column of `sum` is the sum of k
  const uint32_t ones[2] = {0x3f803f80u, 0x3f803f80u};
  fetch(0);
  for (int tile = 0; first_of(tile) < end; ++tile) {
    fetch(tile + 1);  // zeros beyond the end
    cp_async_wait<1>();
    __syncwarp();  // the tile is there for all lanes
    const unsigned char* ks = memory[warp][tile % 2];
    for (int s = 0; s < 2; ++s) {  // 16 tokens
      // Transposed, ldmatrix's matrices are 8 j by 8 tokens of k: j first; and 8 d by 8 tokens of v: tokens first.
      uint32_t fv[2][4];
      for (int i = 0; i < 2; ++i)
        ldmatrix_trans(fv[i], ks + kTile + piece_at(16 * s + lane / 8 % 2 * 8 + lane % 8, 2 * i + lane / 16));
      for (int i = 0; i < 2; ++i) {
        uint32_t fk[4], low[4];
        ldmatrix_trans(fk, ks + piece_at(16 * s + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
        for (int r = 0; r < 4; ++r) {
          float first = low_half(fk[r]), second = high_half(fk[r]);
          if (normed) {
            const int64_t n = first_of(tile) + 16 * s + r / 2 * 8 + 2 * t;
            first *= (n < end ? inverse_rms[n] : 0) * weight[i][r % 2];
            second *= (n + 1 < end ? inverse_rms[n + 1] : 0) * weight[i][r % 2];
          }
          const Split split(relu(first), relu(second));
          fk[r] = split.high;
          low[r] = split.low;
        }
        for (int half = 0; half < (normed ? 2 : 1); ++half) {
          const uint32_t (&key)[4] = half == 0 ? fk : low;
          for (int j = 0; j < 4; ++j)
            mma_m16n8k16_bf16(state[i][j], key, {fv[j / 2][j % 2 * 2], fv[j / 2][j % 2 * 2 + 1]});
          mma_m16n8k16_bf16(sum[i], key, ones);
        }
      }
    }
    __syncwarp();  // before the tile is overwritten
  }
  cp_async_wait<0>();
  __syncwarp();  // the last copies of all lanes have landed, and are overwritten

  constexpr int kPitch = kHead + 1, kSize = kHead * kPitch;
  float* mine = reinterpret_cast<float*>(memory[warp]);
  for (int i = 0; i < 2; ++i) {
    for (int r = 0; r < 4; ++r) {
      float* row = mine + (16 * i + r / 2 * 8 + g) * kPitch;
      for (int j = 0; j < 4; ++j) row[8 * j + 2 * t + r % 2] = state[i][j][r];
      if (t == 0 && r % 2 == 0) row[kHead] = sum[i][r];
    }
  }
  __syncthreads();  // the states of all warps are there
  float* out = p.state + (blockIdx.x * p.chunks + blockIdx.y) * kSize;
  for (int i = threadIdx.x; i < kSize; i += 32 * kWarps) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += reinterpret_cast<const float*>(memory[w])[i];
    out[i] = total;
  }
}

// Kernel 3. blockIdx.x: image and head, blockIdx.y: kWarps * kWarpTiles tiles of 16 tokens.
__device__ void apply_bf16(const Problem<Bf16>& p) {
  const int b = blockIdx.x / p.H, h = blockIdx.x % p.H;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const Bf16* q = p.q.at(b, h);
  const bool normed = p.q_weight.data != nullptr;
  // mma's k = 16 s + 8 r + 2 t + i stands for channel j = 8 t + 4 s + 2 r + i, its column g of tile d for 8 (g / 2) + 2
  // d + g % 2; tile 4 has the sum of k in every column.
  uint32_t high[2][5][2], low[2][5][2];
  const float* state = p.state + blockIdx.x * p.chunks * kHead * (kHead + 1);
  for (int s = 0; s < 2; ++s) {
    for (int r = 0; r < 2; ++r) {
      for (int d = 0; d < 5; ++d) {
        const float* at = state + (8 * t + 4 * s + 2 * r) * (kHead + 1) + (d < 4 ? g / 2 * 8 + 2 * d + g % 2 : kHead);
        const Split split(at[0], at[kHead + 1]);
        high[s][d][r] = split.high;
        low[s][d][r] = split.low;
      }
    }
  }
  float weight[8];
  for (int i = 0; i < 8; ++i) weight[i] = normed ? p.q_weight[h * kHead + 8 * t + i] : 1;

  for (int tile = 0; tile < kWarpTiles; ++tile) {
    const int64_t first = ((int64_t{blockIdx.y} * kWarpTiles + tile) * kWarps + warp) * 16;
    if (first >= p.N) return;
    uint32_t fq[2][4], fq_low[2][4];  // rows g and g + 8
    for (int row = 0; row < 2; ++row) {
      const int64_t n = first + g + row * 8;
      uint4 packed = {};
      if (n < p.N) packed = *reinterpret_cast<const uint4*>(q + n * p.q.token + 8 * t);
      const float scale = normed && n < p.N ? p.inverse_rms[b * p.N + n] : 1;
      const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
      for (int w = 0; w < 4; ++w) {
        const float x = relu(low_half(words[w]) * scale * weight[2 * w]);
        const float y = relu(high_half(words[w]) * scale * weight[2 * w + 1]);
        const Split split(x, y);
        fq[w / 2][w % 2 * 2 + row] = split.high;
        fq_low[w / 2][w % 2 * 2 + row] = split.low;
      }
    }
    float out[5][4] = {};
    for (int s = 0; s < 2; ++s) {
      for (int d = 0; d < 5; ++d) {
        if (normed) mma_m16n8k16_bf16(out[d], fq_low[s], high[s][d]);
        mma_m16n8k16_bf16(out[d], fq[s], low[s][d]);
        mma_m16n8k16_bf16(out[d], fq[s], high[s][d]);
      }
    }
    for (int row = 0; row < 2; ++row) {
      const int64_t n = first + g + row * 8;
      if (n >= p.N) continue;
      const float denominator = out[4][2 * row] + p.eps;
      float values[8];
      for (int i = 0; i < 8; ++i) values[i] = out[i / 2][2 * row + i % 2] / denominator;
      store(values, p.out + ((b * p.N + n) * p.H + h) * kHead + 8 * t);
    }
  }
}

}  // namespace
}  // namespace sana
