// Depthwise 3x3 convolution and gated linear unit on CPUs.
//
// Algorithm (sana_kernels/mix_ffn/reference.py): per token, in float,
//     [a, g] = sum over the 9 neighbours of tap * h, + bias       zero outside the image
//     u = a * SiLU(g)
// rounded once to the dtype, or quantised per token to int8 once its F values are known.
//
// Layouts: h (B, H * W, 2F) contiguous, the values' channels before the gates'; taps and bias are packed once per call,
// as (10, 2F) floats and, where an instruction set wants it, in the order of its vectors.
//
// Tiling: a task is some rows of the grid, one after another, so that two of three input rows are in the cache from the
// row before. Along a row, segments of 16 tokens; within one, a vector of channels at a time goes from token to token
// (depthwise_glu_vector.h). Quantised, the segment's 16 F floats (184 KB at F = 2880) wait in the L2 cache for their
// largest magnitudes. Rows are independent: the bytes of the result do not depend on the threads.
//
// FLOPs: 36 per output, and SiLU; bytes: 2 inputs read and 1 output written. Per vector of 16 outputs that is 26
// operations of the two multiply-add units (18 convolution, 8 SiLU in 16 bits), 13 cycles, for 96 bytes in bf16: 7 per
// cycle, so the bound is arithmetic as long as h comes from a cache. (In bf16 with AVX-512: depthwise_glu_avx512.cpp.)
// Measured on one Zen 5 core (251 GFLOP/s in fp32) at B = 2, N = 1024, F = 2880, h in the last cache: bf16 2.5 ms, 27
// cycles per vector; to int8 2.9 ms; at F = 5600 5.1 and 5.9 ms. AVX2: 8.4 ms. bench/notes/cpu_engine.md has more.
#include <algorithm>

#include "common/cpu_features.h"
#include "common/integers.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "gemm/quantize.h"
#include "mix_ffn/depthwise_glu_cpu.h"

namespace sana {
namespace {

constexpr const DepthwiseGluKernels* kByIsa[kIsas] = {&depthwise_glu_portable, SANA_AVX2(&depthwise_glu_avx2), nullptr,
                                                      SANA_AVX512VNNI(&depthwise_glu_avx512vnni),
                                                      SANA_AVX512(&depthwise_glu_avx512), SANA_AMX(&depthwise_glu_amx)};

constexpr int64_t kTasksPerThread = 4;

}  // namespace

int64_t depthwise_glu_scratch(int64_t F) { return kGluSegment * F; }

int64_t depthwise_filter_floats(int64_t F) { return 20 * F + 2 * F * kArrangedFloats / kArrangedChannels; }

DepthwiseFilter pack_depthwise(const DepthwiseGlu& p, float* memory, int threads) {
  const int64_t channels = 2 * p.F;
  const DepthwiseGluKernels& kernels = choose(kByIsa);
  float *const filter = memory, *const blocks = memory + 10 * channels;
  const bool arranged = kernels.arrange != nullptr && p.dtype == DType::bf16 && p.F % kArrangedChannels == 0 &&
                        (p.weight_dtype == DType::bf16 || !kernels.bf16_taps);
  parallel_for(threads, ceil_div(channels, kArrangedChannels), [&](int64_t block) {
    const int64_t first = block * kArrangedChannels, last = std::min(first + kArrangedChannels, channels);
    for (int64_t c = first; c < last; ++c) {
      float taps[9] = {};
      load_row(at(p.weight, 9 * c, p.weight_dtype), p.weight_dtype, 9, taps);
      for (int64_t tap = 0; tap < 9; ++tap) filter[tap * channels + c] = taps[tap];
    }
    load_row(at(p.bias, first, p.bias_dtype), p.bias_dtype, last - first, filter + 9 * channels + first);
    if (arranged) kernels.arrange(filter + first, channels, blocks + block * kArrangedFloats);
  });
  return {filter, arranged ? blocks : nullptr, &kernels};
}

void depthwise_glu_row(const DepthwiseGluRow& row) { row.filter.kernels->row(row); }

Status depthwise_glu_cpu(const DepthwiseGlu& p, int threads) {
  if (p.B < 1 || p.height < 1 || p.width < 1 || p.F < 1) return Status::bad_shape;
  if (!valid(p.dtype) || !valid(p.weight_dtype) || !valid(p.bias_dtype)) return Status::bad_dtype;
  const int64_t rows = p.B * p.height, tasks = std::min(rows, kTasksPerThread * threads);
  const int64_t scratch = p.scale == nullptr ? 0 : depthwise_glu_scratch(p.F);
  static thread_local Scratch memory;
  const int64_t filter_floats = depthwise_filter_floats(p.F);
  float* const floats = reinterpret_cast<float*>(memory.reserve((filter_floats + tasks * scratch) * sizeof(float)));
  if (floats == nullptr) return Status::out_of_memory;
  const DepthwiseFilter filter = pack_depthwise(p, floats, threads);

  const int64_t in_pitch = p.width * 2 * p.F, out_pitch = p.width * (p.scale == nullptr ? p.F : quantized_pitch(p.F));
  parallel_for(threads, tasks, [&](int64_t task) {
    for (int64_t r = rows * task / tasks; r < rows * (task + 1) / tasks; ++r) {
      const int64_t y = r % p.height;
      DepthwiseGluRow row = {};
      row.h[0] = y == 0 ? nullptr : at(p.h, (r - 1) * in_pitch, p.dtype);
      row.h[1] = at(p.h, r * in_pitch, p.dtype);
      row.h[2] = y == p.height - 1 ? nullptr : at(p.h, (r + 1) * in_pitch, p.dtype);
      row.pitch = 2 * p.F;
      row.filter = filter;
      row.out = p.scale == nullptr ? at(p.out, r * out_pitch, p.dtype) : static_cast<char*>(p.out) + r * out_pitch;
      row.scale = p.scale == nullptr ? nullptr : p.scale + r * p.width;
      row.scratch = floats + filter_floats + task * scratch;
      row.width = p.width;
      row.F = p.F;
      row.dtype = p.dtype;
      depthwise_glu_row(row);
    }
  });
  return Status::ok;
}

}  // namespace sana
