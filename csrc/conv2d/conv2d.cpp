// The DC-AE's convolutions on CPUs: implicit matrix products over tiles of 8 rows x 32 pixels of the result.
//
// Algorithm (sana_kernels/conv2d/reference.py), for each tile, on one thread:
//     gather      the 10 x 34 pixels that the tile sees, zeros beyond the image, into a window: copied,
//                 normalised where there is an input norm, quantised with one scale for the tile where weights are int8
//     products    sums of a few rows x all N columns; K is 9 C. In the window a row of taps is 3 C elements that follow
//                 each other, and the next pixel's begin C elements further: operand rows of a matrix that never exists
//     epilogue    of each pixel: scales, bias, activation, RMSNorm over channels, residual or shortcut, rounding
// An upsampling is four such products with 2 x 2 taps, each of which makes every other pixel of every other row. There
// is another way for both, for a stride of 1, with a quarter or 9/16 of the multiplications: winograd_vector.h.
//
// Tiling: the window (87 KB at C = 128, 348 KB at C = 512 in bf16) and at most 256 KB of sums (on AMX two groups of 512
// KB) stay in a core's second-level cache, as the RMSNorm needs all columns of a pixel together (but for AVX2, which
// widens what a group of rows sees to twice its bytes). The weights (4.7 MB at C = N = 512 in bf16) come from the last
// cache once per group of rows, which at 128 pixels is 128 FLOP per byte and core. A tile's result depends on nothing but
// the pixels that it sees, and no sum is split between threads: bands, and any number of threads, give the same bytes.
//
// FLOPs: 18 C N per pixel (32 C N for the four of an upsampling). Bytes: x 1.33 times, most of it from the last cache,
// the residual and the result once. Bound: the multiply unit. 16 sums take K / 4 cycles of products in bf16 and K / 8
// in int8 with two units of 512 bits; beside them, gather and epilogue are 5 to 17 % of the time.
// Measured: bench/notes/decoder.md.
#include "conv2d/conv2d.h"

#include <algorithm>
#include <atomic>

#include "common/cpu_features.h"
#include "common/integers.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "conv2d/conv2d_cpu.h"

namespace sana {
namespace {

constexpr const Conv2dKernels* kNarrow[kIsas] = {&conv2d_portable, SANA_AVX2(&conv2d_avx2),
                                                 SANA_AVXVNNI(&conv2d_avxvnni), SANA_AVX512VNNI(&conv2d_avx512vnni),
                                                 SANA_AVX512(&conv2d_avx512),
                                                 SANA_AMX(&conv2d_amx)};
// Tiles multiply no floats.
constexpr const Conv2dKernels* kFloat[kIsas] = {&conv2d_portable, SANA_AVX2(&conv2d_avx2), nullptr,
                                                SANA_AVX512VNNI(&conv2d_avx512vnni),
                                                SANA_AVX512(&conv2d_avx512), nullptr};

// Nor do they stop within a step of 64 bytes: beyond a row of taps they multiply the next pixels by zero, which makes
// NaN of an infinity there.
constexpr const Conv2dKernels* kPartialSteps[kIsas] = {&conv2d_portable, SANA_AVX2(&conv2d_avx2), nullptr,
                                                       SANA_AVX512VNNI(&conv2d_avx512vnni),
                                                       SANA_AVX512(&conv2d_avx512), nullptr};

// Transformed kernels are for vectors.
constexpr const Conv2dKernels* kTransformed[kIsas] = {&conv2d_portable, SANA_AVX2(&conv2d_avx2),
                                                      SANA_AVXVNNI(&conv2d_avxvnni),
                                                      SANA_AVX512VNNI(&conv2d_avx512vnni),
                                                      SANA_AVX512(&conv2d_avx512),
                                                      nullptr};

// A task is a tile, or some side by side where an epilogue runs beside the products of the next one.
constexpr int64_t kTasksPerThread = 4, kMostTiles = 32;

bool valid(const Conv2d& p) {
  const bool one = p.phases == 1 && p.kernel == 3 && (p.stride == 1 || p.stride == 2);
  const bool four = p.phases == 4 && (p.kernel == 2 || p.kernel == 3) && p.stride == 1 && p.norm.weight == nullptr;
  const bool transformed = (p.phases == 1 ? p.kernel == 6 : four && p.kernel == 3 && !p.bias_by_phase) &&
                           p.stride == 1 && p.weight_scale != nullptr && p.weight_bytes <= 2;
  const bool direct = (one || four) && (p.weight_scale == nullptr || p.weight_bytes == 1);
  return (p.transformed ? transformed : direct) && p.B > 0 && p.x.count > 0 && p.width > 0 && p.C > 0 && p.N > 0 &&
         p.band.first < p.band.last;
}

}  // namespace

Status conv2d_cpu(const Conv2d& p, int threads) {
  if (!valid(p)) return Status::bad_shape;
  if (p.dtype != DType::f32 && p.dtype != DType::bf16) return Status::bad_dtype;
  const bool floats = p.dtype == DType::f32 && p.weight_scale == nullptr;
  const bool partial = p.weight_scale == nullptr && p.C % 32 != 0;  // steps, of bf16
  const Conv2dKernels& kernels = floats          ? choose(kFloat)
                                 : partial       ? choose(kPartialSteps)
                                 : p.transformed ? choose(kTransformed)
                                                 : choose(kNarrow);
  const Layout layout = layout_of(p, kernels);
  const WinogradLayout transformed = winograd_layout(p);
  const int64_t rows = p.band.last - p.band.first, pixels = width_of_result(p);
  const int64_t down = ceil_div(rows, kTileRows);
  const int64_t tiles = p.B * down * ceil_div(pixels, kTilePixels);
  const int64_t bytes_transformed = transformed.memory + kernels.buffer * transformed.products.panel / 16 +
                                    kernels.window * transformed.products.row;
  const int64_t bytes = p.transformed ? bytes_transformed : layout.memory;
  const int64_t most = kernels.groups == 1 ? 1 : kMostTiles;
  const int64_t side_by_side = std::clamp<int64_t>(tiles / (kTasksPerThread * threads), 1, most);
  const int64_t run = p.transformed ? patches_of(p.kernel).width : side_by_side * kTilePixels;
  const int64_t across = ceil_div(pixels, run);
  std::atomic<bool> failed{false};
  parallel_for(threads, p.B * down * across, [&](int64_t task) {
    const int64_t row = task / across % down * kTileRows, pixel = task % across * run;
    static thread_local Scratch scratch;
    char* memory = scratch.reserve(bytes);
    if (memory == nullptr) {
      failed = true;
      return;
    }
    kernels.tiles(p, layout,
                  {task / across / down, p.band.first + row, pixel, std::min(kTileRows, rows - row),
                   std::min(run, pixels - pixel)},
                  memory);
  });
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace sana
