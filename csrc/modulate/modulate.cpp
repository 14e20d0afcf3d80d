// Adaptive layer norm and gated residual on CPUs.
//
// Algorithm (sana_kernels/modulate/reference.py): per token, in float and rounded once at the end,
//     modulate        y = (x - mean) / sqrt(variance + eps) * (1 + scale) + shift      mean and variance over C
//     gate_residual   out = x + gate * y
// The variance is the mean of (x - mean)^2, taken after the mean is known: activations with outliers would cancel in
// E[x^2] - mean^2. A row of C elements (4.5 KB at C = 2240 in bf16) stays in the L1 cache for its three passes.
// Quantised, a third pass finds the largest magnitude of y and a fourth computes y again, which is cheaper than keeping
// it.
//
// Layouts: x, y (B, N, C) with any strides of B and N; shift, scale, gate (B, C), the same for all tokens of an image,
// are widened to float once per call, with 1 added to scale; out (B, N, C) contiguous.
//
// Tiling: a task is 16 tokens of one image. Rows are independent, so the bytes of the result do not depend on the
// threads.
//
// Bytes: modulate 2 B N C elements, gate_residual 3 B N C. FLOPs: 7 (quantised 13) and 2 per element. Bound by memory.
#include <algorithm>
#include <memory>
#include <new>

#include "common/cpu_features.h"
#include "common/integers.h"
#include "common/threads.h"
#include "modulate/modulate_cpu.h"

namespace sana {
namespace {

constexpr int64_t kTokens = 16;  // of one task

constexpr const ModulateKernels* kByIsa[kIsas] = {&modulate_portable, SANA_AVX2(&modulate_avx2), nullptr,
                                                  SANA_AVX512VNNI(&modulate_avx512vnni),
                                                  SANA_AVX512(&modulate_avx512), nullptr};

using Floats = std::unique_ptr<float[]>;

// The rows of all images as (B, C) floats, each plus `addend`; null where there is no memory.
template <class Problem>
Floats widen(const Problem& p, const ImageRows& rows, float addend) {
  Floats wide(new (std::nothrow) float[p.B * p.C]);
  for (int64_t b = 0; b < p.B && wide != nullptr; ++b) {
    load_row(at(rows.data, b * rows.stride, rows.dtype), rows.dtype, p.C, &wide[b * p.C]);
    for (int64_t c = 0; c < p.C; ++c) wide[b * p.C + c] += addend;
  }
  return wide;
}

// f(b, first, last) for every image and every kTokens of its tokens.
template <class Problem, class F>
void for_tokens(const Problem& p, int threads, F f) {
  const int64_t blocks = ceil_div(p.N, kTokens);
  parallel_for(threads, p.B * blocks, [&](int64_t task) {
    const int64_t first = task % blocks * kTokens;
    f(task / blocks, first, std::min(first + kTokens, p.N));
  });
}

template <class Problem>
Status check(const Problem& p) {
  if (p.B < 1 || p.N < 1 || p.C < 1) return Status::bad_shape;
  return valid(p.dtype) ? Status::ok : Status::bad_dtype;
}

}  // namespace

Status modulate_cpu(const Modulate& p, int threads) {
  if (const Status status = check(p); status != Status::ok) return status;
  if (!valid(p.shift.dtype) || !valid(p.scale.dtype)) return Status::bad_dtype;
  const Floats shift = widen(p, p.shift, 0), scale = widen(p, p.scale, 1);
  if (shift == nullptr || scale == nullptr) return Status::out_of_memory;
  const ModulateKernels& kernels = choose(kByIsa);
  for_tokens(p, threads, [&](int64_t b, int64_t first, int64_t last) {
    kernels.modulate(p, &shift[b * p.C], &scale[b * p.C], b, first, last);
  });
  return Status::ok;
}

Status gate_residual_cpu(const GateResidual& p, int threads) {
  if (const Status status = check(p); status != Status::ok) return status;
  if (!valid(p.gate.dtype)) return Status::bad_dtype;
  const Floats gate = widen(p, p.gate, 0);
  if (gate == nullptr) return Status::out_of_memory;
  const ModulateKernels& kernels = choose(kByIsa);
  for_tokens(p, threads,
             [&](int64_t b, int64_t first, int64_t last) { kernels.gate_residual(p, &gate[b * p.C], b, first, last); });
  return Status::ok;
}

}  // namespace sana
