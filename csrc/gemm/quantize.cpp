// Rows of floats to rows of int8 with one scale each, on CPUs.
//
// Algorithm (sana_kernels/gemm/reference.py, met to the bit): a first pass over the row finds its largest magnitude, a
// second multiplies by 127 / largest and rounds to nearest, ties to even. A row (11 KB at K = 5600 in bf16) stays in
// the L1 cache for both.
//
// Tiling: a task is 16 rows. Bytes: K elements read, K int8 written per row. FLOPs: 2 per element. Bound by memory.
#include <algorithm>

#include "common/cpu_features.h"
#include "common/integers.h"
#include "common/threads.h"
#include "gemm/quantize_cpu.h"

namespace sana {
namespace {

constexpr int64_t kRows = 16;  // of one task

constexpr const QuantizeKernels* kByIsa[kIsas] = {&quantize_portable, SANA_AVX2(&quantize_avx2), nullptr,
                                                  SANA_AVX512VNNI(&quantize_avx512vnni),
                                                  SANA_AVX512(&quantize_avx512), nullptr};

}  // namespace

Status quantize_cpu(const Quantize& p, int threads) {
  if (p.rows < 1 || p.K < 1) return Status::bad_shape;
  if (!valid(p.dtype)) return Status::bad_dtype;
  const QuantizeKernels& kernels = choose(kByIsa);
  parallel_for(threads, ceil_div(p.rows, kRows),
               [&](int64_t task) { kernels.rows(p, task * kRows, std::min((task + 1) * kRows, p.rows)); });
  return Status::ok;
}

}  // namespace sana
