// The middle of SANA's Mix-FFN on NVIDIA GPUs, sm_80 and newer: depthwise 3 x 3 convolution, bias, gated linear unit.
//
// Algorithm (sana_kernels/mix_ffn/reference.py), in float and rounded once:
//     d[y][x][c] = bias[c] + sum over dy, dx of weight[c][dy][dx] * h[y + dy - 1][x + dx - 1][c]     zeros beyond the
//     image u[y][x][c] = d[y][x][c] * SiLU(d[y][x][F + c])      for c < F
// For 8-bit rows, u is written in h's dtype and read back by csrc/gemm/quantize.cu: the largest |u| of a token is known
// only when all F channels are, and a block that owned whole tokens would keep F = 5600 channels of few of them: with 4
// tokens it would read every value of h 4.5 times, here 1.6. u (23 MB at 1024 px) stays in the L2 cache in between.
//
// Layouts: h (B, H, W, 2F), u (B, H, W, F), NHWC, contiguous, of float, half or bfloat16; bias (2F); weight (2F, 9) by its
// strides. Tap by tap a warp reads it in whole lines, channel by channel in one line for every second lane.
//
// Tiling: a block makes 8 x 8 tokens of 64 channels. It copies 10 x 10 tokens of 64 values and their 64 gates into
// shared memory, 16 bytes at a time and asynchronously; the copy fills what lies beyond the image with zeros. Warp w
// then walks down column w, each lane with two channels: every row of three tokens that it reads is the top of one
// output, the middle of the one above and the bottom of the one above that, so that 12 values read make 36
// multiply-adds.
//
// Bytes: 3 B N F elements, and 1.6 - 1 times 2 B N F from the L2 cache. FLOPs: 36 per output, and a SiLU. At 2 x 1024
// tokens of F = 5600 in bfloat16: 69 MB, 16 us at 4.3 TB/s; 11.5e6 outputs at about 50 instructions each, 20 us of a
// GPU with 132 multiprocessors. Instructions and memory are both near their bounds.
#include "common/cuda_common.cuh"
#include "common/cuda_status.h"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "mix_ffn/depthwise_glu_cuda.h"

namespace sana {
namespace {

constexpr int kRows = 8, kColumns = 8;  // of tokens, per block
constexpr int kChannels = 64;           // values per block, and as many gates
constexpr int kThreads = 32 * kColumns;
constexpr int kTileColumns = kColumns + 2, kTileRows = kRows + 2;

template <class T>
struct Problem {
  const T* h;
  const void *weight, *bias;
  T* out;
  int height, width, F, tiles_x, tiles_y;
  int64_t weight_channel, weight_tap;
  bool float_weight, float_bias;
  bool aligned;  // rows of h can be read 16 bytes at a time
};

template <class T>
__device__ float read(const void* data, int64_t index, bool is_float) {
  return is_float ? static_cast<const float*>(data)[index] : to_float(static_cast<const T*>(data)[index]);
}

// Copies the block's tokens and a border of one into shared memory: [row][column][values, then gates].
template <class T>
__device__ void load_tile(T* tile, const Problem<T>& p, int64_t image, int top, int left, int first) {
  constexpr int V = 16 / sizeof(T), kPacks = kChannels / V;
  for (int i = threadIdx.x; i < kTileRows * kTileColumns * 2 * kPacks; i += kThreads) {
    const int pixel = i / (2 * kPacks), half = i / kPacks % 2, channel = first + i % kPacks * V;
    const int y = top - 1 + pixel / kTileColumns, x = left - 1 + pixel % kTileColumns;
    const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width && channel < p.F;
    const T* from = inside ? p.h + ((image * p.height + y) * p.width + x) * 2 * p.F + half * p.F + channel : p.h;
    if (p.aligned) {
      cp_async<16>(tile + i * V, from, inside ? 16 : 0);
    } else {
      for (int k = 0; k < V; ++k) tile[i * V + k] = inside && channel + k < p.F ? from[k] : from_float<T>(0);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
}

// blockIdx.x: tile of tokens of an image, blockIdx.y: channels.
template <class T>
__global__ void __launch_bounds__(kThreads) depthwise_glu_kernel(Problem<T> p) {
  T* tile = dynamic_shared<T>();
  const int64_t image = blockIdx.x / (p.tiles_x * p.tiles_y);
  const int top = blockIdx.x / p.tiles_x % p.tiles_y * kRows, left = blockIdx.x % p.tiles_x * kColumns;
  const int lane = threadIdx.x % 32, column = threadIdx.x / 32, channel = blockIdx.y * kChannels + 2 * lane;
  load_tile(tile, p, image, top, left, blockIdx.y * kChannels);
  if (left + column >= p.width || channel >= p.F) return;

  // [value and gate of the first channel, of the second]; the second may lie beyond F.
  float weight[4][9], bias[4];
  for (int i = 0; i < 4; ++i) {
    const int c = i % 2 * p.F + min(channel + i / 2, p.F - 1);
    bias[i] = read<T>(p.bias, c, p.float_bias);
    for (int k = 0; k < 9; ++k) {
      weight[i][k] = read<T>(p.weight, c * p.weight_channel + k * p.weight_tap, p.float_weight);
    }
  }

  // Sums of the outputs of which input row `row` is the bottom, the middle and the top.
  float bottom[4] = {}, middle[4] = {}, above[4];
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) {
    for (int i = 0; i < 4; ++i) above[i] = bias[i];
    for (int dx = 0; dx < 3; ++dx) {
      const T* token = tile + (row * kTileColumns + column + dx) * 2 * kChannels + 2 * lane;
      float value[2], gate[2];
      load(token, value);
      load(token + kChannels, gate);
      for (int i = 0; i < 4; ++i) {
        const float h = i % 2 == 0 ? value[i / 2] : gate[i / 2];
        above[i] = fmaf(weight[i][dx], h, above[i]);
        middle[i] = fmaf(weight[i][3 + dx], h, middle[i]);
        bottom[i] = fmaf(weight[i][6 + dx], h, bottom[i]);
      }
    }
    const int y = top + row - 2;
    if (row >= 2 && y < p.height) {
      T* out = p.out + ((image * p.height + y) * p.width + left + column) * p.F + channel;
      const float u[2] = {bottom[0] * silu(bottom[1]), bottom[2] * silu(bottom[3])};
      if (p.F % 2 == 0) {
        store(u, out);
      } else {
        out[0] = from_float<T>(u[0]);
        if (channel + 1 < p.F) out[1] = from_float<T>(u[1]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      bottom[i] = middle[i];
      middle[i] = above[i];
    }
  }
}

template <class T>
cudaError_t run(const DepthwiseGluArgs& args, cudaStream_t stream) {
  Problem<T> p;
  p.h = static_cast<const T*>(args.h);
  p.weight = args.weight;
  p.bias = args.bias;
  p.out = static_cast<T*>(args.out);
  p.height = static_cast<int>(args.height);
  p.width = static_cast<int>(args.width);
  p.F = static_cast<int>(args.F);
  p.tiles_x = static_cast<int>(ceil_div(args.width, kColumns));
  p.tiles_y = static_cast<int>(ceil_div(args.height, kRows));
  p.weight_channel = args.weight_channel;
  p.weight_tap = args.weight_tap;
  p.float_weight = args.weight_dtype == DType::f32;
  p.float_bias = args.bias_dtype == DType::f32;
  p.aligned = reinterpret_cast<uintptr_t>(args.h) % 16 == 0 && args.F * sizeof(T) % 16 == 0;
  const dim3 grid(static_cast<unsigned>(args.B * p.tiles_x * p.tiles_y),
                  static_cast<unsigned>(ceil_div(args.F, kChannels)));
  const size_t shared = kTileRows * kTileColumns * 2 * kChannels * sizeof(T);  // 25.6 KB in 16 bits
  return launch_kernel<depthwise_glu_kernel<T>>(grid, dim3(kThreads), shared, stream, p);
}

}  // namespace

Status depthwise_glu_cuda(const DepthwiseGluArgs& p, void* stream) {
  if (p.B < 1 || p.height < 1 || p.width < 1 || p.F < 1) return Status::bad_shape;
  if (!valid(p.dtype) || !valid(p.weight_dtype) || !valid(p.bias_dtype)) return Status::bad_dtype;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::f32) return cuda_status(run<float>(p, on));
  if (p.dtype == DType::f16) return cuda_status(run<__half>(p, on));
  return cuda_status(run<__nv_bfloat16>(p, on));
}

}  // namespace sana
