// The DC-AE's small ops on CPUs, pixel by pixel: RMSNorm, and the multi-scale branch of its attention.
//
// rms_norm: a pixel's channels (2 KB at C = 1024 in bf16) are read twice, the second time from the first-level cache.
// Bytes: x and the residual read, the result written. Bound by memory.
//
// multi_scale: k x k depthwise, then D x D products in groups of D channels, for 32 pixels and one group at a time: the
// 32 D floats between the two (4 KB) never leave the first-level cache. FLOPs: 2 (k^2 + D) per element; at k = 5 and
// D = 32 in bf16 that is 28 per byte. Bound: loads of x and of the taps, two for each multiply-add of the first half.
// All of it is 0.2 % of the decoder's work.
#include <algorithm>
#include <atomic>

#include "common/cpu_features.h"
#include "common/integers.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "conv2d/conv2d_cpu.h"

namespace sana {
namespace {

constexpr const PixelKernels* kByIsa[kIsas] = {&pixels_portable, SANA_AVX2(&pixels_avx2), nullptr,
                                               SANA_AVX512VNNI(&pixels_avx512vnni),
                                               SANA_AVX512(&pixels_avx512), nullptr};
constexpr int64_t kPixels = 64;  // of a task of rms_norm

}  // namespace

Status rms_norm_cpu(const RmsNorm& p, int threads) {
  if (p.rows < 1 || p.C < 1) return Status::bad_shape;
  if (!valid(p.dtype)) return Status::bad_dtype;
  const PixelKernels& kernels = choose(kByIsa);
  parallel_for(threads, ceil_div(p.rows, kPixels), [&](int64_t task) {
    kernels.rms_norm(p, task * kPixels, std::min((task + 1) * kPixels, p.rows));
  });
  return Status::ok;
}

Status multi_scale_cpu(const MultiScale& p, int threads) {
  if (p.B < 1 || p.width < 1 || p.D < 1 || p.C % p.D || p.kernel % 2 == 0) return Status::bad_shape;
  if (p.dtype != DType::f32 && p.dtype != DType::bf16) return Status::bad_dtype;
  const PixelKernels& kernels = choose(kByIsa);
  const int64_t rows = p.band.last - p.band.first;
  std::atomic<bool> failed{false};
  parallel_for(threads, p.B * rows, [&](int64_t task) {
    static thread_local Scratch scratch;
    float* memory = reinterpret_cast<float*>(scratch.reserve(kTilePixels * p.D * sizeof(float)));
    if (memory == nullptr) failed = true;
    else kernels.multi_scale(p, task / rows, p.band.first + task % rows, memory);
  });
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace sana
