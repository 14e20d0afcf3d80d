// Matrix products on CPUs: how the work is split. The products themselves are in gemm_<isa>.cpp.
//
// Algorithm (sana_kernels/gemm/reference.py): out = epilogue(x weight^T) with bf16 operands and float sums, or with int8
// operands, int32 sums and one scale per row of x and per column of the result.
//
// Tiling: the columns are cut into nearly equal blocks, about as many as there are threads or a multiple of that, whose
// weights fill at most half of a core's second-level cache (on AMX more, GemmKernels::eighths); a task is one such
// block times some of the rows. Tasks of one block follow each other, and a thread begins with a range of its own of
// them, so that it finds the weights where it left them, other cores need not read them, and x (a few MB) streams past.
// No sum is ever split between tasks: the bytes of the result do not depend on the number of threads.
//
// FLOPs: 2 M N K. Bytes: x once per column block, the weights and the result once. At SANA's sizes
// (M = 2048, K, N >= 1152) that is more than 400 FLOP per byte, so the bound is the multiply unit.
#include "gemm/gemm.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>

#include "common/cpu_features.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "gemm/gemm_cpu.h"

namespace sana {
namespace {

constexpr const GemmKernels* kByIsa[kIsas] = {&gemm_portable, SANA_AVX2(&gemm_avx2), SANA_AVXVNNI(&gemm_avxvnni),
                                              SANA_AVX512VNNI(&gemm_avx512vnni),
                                              SANA_AVX512(&gemm_avx512), SANA_AMX(&gemm_amx)};

// Enough that the weights of a task are worth loading; the fewer, the more of its share a core that is busy elsewhere
// leaves to the others.
constexpr int64_t kRowsPerTask = 512;

int64_t second_level_cache() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return int64_t(size);
#endif
    return int64_t(1) << 20;
  }();
  return bytes;
}

// `total` in `parts` nearly equal parts, each a multiple of `unit`: the size of one.
int64_t part_of(int64_t total, int64_t parts, int64_t unit) { return ceil_div(ceil_div(total, unit), parts) * unit; }

// Rows of a task where `across` blocks of columns are to be shared out: of about kRowsPerTask, or fewer where otherwise
// there were fewer than two tasks for a thread, such that the thread with most to do has least.
int64_t rows_of_task(int64_t M, int64_t across, int64_t unit, int64_t threads) {
  const int64_t fewest = std::max(M / kRowsPerTask, ceil_div(2 * threads, across));
  int64_t best = 0, least = 0;
  for (int64_t blocks = fewest; blocks <= fewest + threads; ++blocks) {
    const int64_t rows = part_of(M, blocks, unit);
    const int64_t most = ceil_div(across * ceil_div(M, rows), threads) * rows;  // of one thread, per block of columns
    if (best == 0 || most < least) best = rows, least = most;
  }
  return best;
}

}  // namespace

Status gemm_cpu(const Gemm& given, int threads) {
  Gemm p = given;
  p.stream = p.stream && p.M * p.N * element_size(p.dtype) > second_level_cache();
  if (p.M < 1 || p.N < 16 || p.K < 1 || p.N % 16 || row_bytes(p) % 64) return Status::bad_shape;
  if (!valid(p.dtype)) return Status::bad_dtype;
  const GemmKernels& kernels = choose(kByIsa);
  const int64_t cache = second_level_cache(), of_rows = 2 * kernels.rows * row_bytes(p);  // these, and the next
  const int64_t of_weights = std::min(cache * kernels.eighths / 8, std::max(cache - of_rows, cache / 2));
  const int64_t least = ceil_div(p.N * row_bytes(p), of_weights);
  const int64_t units = ceil_div(p.N, kernels.columns), most = ceil_div(units, ceil_div(least, threads) * threads);
  const int64_t across = ceil_div(units, most);
  const auto column = [&](int64_t block) { return std::min(block * units / across * kernels.columns, p.N); };
  const int64_t rows = threads == 1 ? p.M : rows_of_task(p.M, across, kernels.rows, threads);
  const int64_t down = ceil_div(p.M, rows);
  std::atomic<bool> failed{false};
  parallel_for(threads, across * down, [&](int64_t task) {
    const int64_t row = task % down * rows, block = task / down;
    static thread_local Scratch scratch;
    char* buffer = scratch.reserve(kernels.scratch * (row_bytes(p) + kLine) + 4 * rows);
    if (buffer == nullptr) failed = true;
    else kernels.block(p, {row, std::min(row + rows, p.M), column(block), column(block + 1), row == 0, cache}, buffer);
  });
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace sana
