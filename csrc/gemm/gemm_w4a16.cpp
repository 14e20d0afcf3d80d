// Matrix product with 4-bit weights and 16-bit (or float) activations on CPUs: how the work is split.
//
// Algorithm (sana_kernels/gemm/int4_reference.py): out[m][n] = epilogue(sum over groups g of scale[n][g] * dot), where
// dot = sum over k in g of x[m][k] * q[n][k] with the integers q in [-7, 7]. Products and sums are float; an integer q
// is exact in bf16 too, so bf16 activations take the dot products of pairs where the processor has them.
//
// Layouts: the weights stay as the checkpoint has them, rows of nibbles, and the lanes of a vector are neighbours along
// K. Unpacking 2 w nibbles makes a vector of the w even k and one of the w odd k; so each row of x is first brought into
// that order, once per call. A sum per lane is kept for each result until K is at its end.
//
// Tiling: a task is up to 64 columns of up to 64 rows, fewer where they would not stay in the second-level cache.
// Within it, 4 columns at a time; up to 4 rows meet them straight from the nibbles, more rows share a panel of the 4
// columns unpacked (18 KB at K = 2304 in bf16). A result is summed in the same order either way: its bytes depend
// neither on the number of threads nor on that of the other rows.
//
// Bytes: N K (1/2 + 4/group) of weights per block of rows. FLOPs: 2 M N K, plus 2 per group for its scale. Up to M = 4
// the bound is the bandwidth at which the nibbles arrive (0.56 bytes per weight in groups of 64, a 3.5th of bf16); from
// there on the multiply unit, of which the scales take a third in bf16 and a ninth in float.
#include "gemm/gemm_w4a16.h"

#include <algorithm>
#include <atomic>

#include "common/cpu_features.h"
#include "common/integers.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "gemm/gemm_w4a16_cpu.h"

namespace sana {
namespace {

constexpr const GemmW4A16Kernels* kByIsa[kIsas] = {&gemm_w4a16_portable, SANA_AVX2(&gemm_w4a16_avx2), nullptr,
                                                   SANA_AVX512VNNI(&gemm_w4a16_avx512vnni),
                                                   SANA_AVX512(&gemm_w4a16_avx512), nullptr};

constexpr int64_t kMostRows = 64;
constexpr int64_t kRowsBytes = 512 << 10;  // of a task's rows of x: half of a core's second-level cache

}  // namespace

Status gemm_w4a16_cpu(const GemmW4A16& p, int threads) {
  const int64_t M = p.gemm.M, N = p.gemm.N;
  if (M < 1 || N < 1 || p.gemm.K < 1 || p.group < 64 || p.group % 64 || padded_k(p) < p.gemm.K) return Status::bad_shape;
  if (!valid(p.x_dtype) || !valid(p.gemm.dtype)) return Status::bad_dtype;
  const GemmW4A16Kernels& kernels = choose(kByIsa);
  const int64_t bytes = kernels.row_bytes(p);

  static thread_local Scratch arranged;
  char* const x = arranged.reserve(M * bytes);
  if (x == nullptr) return Status::out_of_memory;
  parallel_for(threads, M, [&](int64_t row) { kernels.arrange(p, row, x + row * bytes); });

  const int64_t rows = std::clamp<int64_t>(kRowsBytes / bytes / 4 * 4, 4, kMostRows);
  const int64_t across = ceil_div(N, kW4A16Columns), down = ceil_div(M, rows);
  std::atomic<bool> failed{false};
  parallel_for(threads, across * down, [&](int64_t task) {
    const int64_t row = task / across * rows, column = task % across * kW4A16Columns;
    static thread_local Scratch scratch;
    char* const panel = scratch.reserve(4 * bytes + rows * kW4A16Columns * sizeof(float));
    if (panel == nullptr) failed = true;
    else
      kernels.block(p, {row, std::min(row + rows, M), column, std::min(column + kW4A16Columns, N)}, x + row * bytes,
                    panel, reinterpret_cast<float*>(panel + 4 * bytes));
  });
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace sana
