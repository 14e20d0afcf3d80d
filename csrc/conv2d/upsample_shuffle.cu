// The end of the DC-AE decoder's upsampling on NVIDIA GPUs, sm_80 and newer: four phases become pixels, plus bias and
// shortcut.
//
// Algorithm (sana_kernels/conv2d/reference.py): a nearest-neighbour x2 and a 3 x 3 convolution are four 2 x 2
// convolutions of the small image, one per phase (dy, dx) of the output pixels. The library makes `phases` of them;
// then
//     out[2h + dy][2w + dx][c] = phases[h + dy][w + dx][(2 dy + dx) C + c] + bias[c]
//                                + x[h][w][(4 c + 2 dy + dx) / repeats]
// where the last term, channels repeated and shuffled into pixels, is the shortcut without parameters.
//
// Layouts: NHWC, contiguous: phases (B, H + 1, W + 1, 4 C), x (B, H, W, 4 C / repeats), out (B, 2H, 2W, C); float, half
// or bfloat16.
//
// Tiling: a thread makes the four pixels of one h, w in 8 channels: what it needs of x are 32 / repeats neighbours,
// read once. Neighbouring threads have neighbouring channels.
//
// Bytes: 4 B H W C elements twice, and 1 / repeats of that for x. FLOPs: 2 per output. Bound by memory: to 1024 px with
// C = 128 in bfloat16 672 MB, 156 us at 4.3 TB/s. The convolution before it has 4/9 of the multiply-adds of the 3 x 3.
#include "common/cuda_common.cuh"
#include "common/cuda_status.h"
#include "common/launch.cuh"
#include "conv2d/conv2d_cuda.h"

namespace sana {
namespace {

constexpr int kThreads = 256, kChannels = 8;

template <class T>
struct Problem {
  const T *phases, *x, *bias;
  T* out;
  int64_t threads;  // B H W C / kChannels
  int H, W, C;
};

template <class T, int Repeats>
__global__ void __launch_bounds__(kThreads, 1) upsample_shuffle_kernel(Problem<T> p) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= p.threads) return;
  const int runs = p.C / kChannels, c = static_cast<int>(index % runs) * kChannels;
  const int64_t pixel = index / runs, image = pixel / (p.H * p.W);
  const int h = static_cast<int>(pixel / p.W % p.H), w = static_cast<int>(pixel % p.W);
  constexpr int kNeighbours = 4 * kChannels / Repeats;
  float x[kNeighbours], bias[kChannels];
  load(p.x + (pixel * p.C + c) * 4 / Repeats, x);
  load(p.bias + c, bias);
#pragma unroll
  for (int phase = 0; phase < 4; ++phase) {
    const int dy = phase / 2, dx = phase % 2;
    float y[kChannels];
    load(p.phases + (((image * (p.H + 1) + h + dy) * (p.W + 1) + w + dx) * 4 + phase) * p.C + c, y);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) y[i] += bias[i] + x[(4 * i + phase) / Repeats];
    store(y, p.out + (((image * p.H + h) * 2 + dy) * 2 * p.W + 2 * w + dx) * p.C + c);
  }
}

template <class T>
cudaError_t run(const UpsampleShuffle& args, cudaStream_t stream) {
  const auto pointer = [](const void* data) { return static_cast<const T*>(data); };
  const Problem<T> p = {pointer(args.phases),
                        pointer(args.x),
                        pointer(args.bias),
                        static_cast<T*>(args.out),
                        args.B * args.H * args.W * args.C / kChannels,
                        static_cast<int>(args.H),
                        static_cast<int>(args.W),
                        static_cast<int>(args.C)};
  const dim3 grid(static_cast<unsigned>(ceil_div(p.threads, kThreads)));
  return args.repeats == 2 ? launch_kernel<upsample_shuffle_kernel<T, 2>>(grid, dim3(kThreads), 0, stream, p)
                           : launch_kernel<upsample_shuffle_kernel<T, 4>>(grid, dim3(kThreads), 0, stream, p);
}

}  // namespace

Status upsample_shuffle_cuda(const UpsampleShuffle& p, void* stream) {
  if (p.B < 1 || p.H < 1 || p.W < 1 || p.C < 1 || p.C % kChannels != 0) return Status::bad_shape;
  if (p.repeats != 2 && p.repeats != 4) return Status::bad_shape;
  if (!valid(p.dtype)) return Status::bad_dtype;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::f32) return cuda_status(run<float>(p, on));
  if (p.dtype == DType::f16) return cuda_status(run<__half>(p, on));
  return cuda_status(run<__nv_bfloat16>(p, on));
}

}  // namespace sana
