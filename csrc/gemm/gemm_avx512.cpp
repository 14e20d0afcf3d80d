// Matrix product for AVX-512: dot products of int8 quadruples (VNNI) or bf16 pairs (BF16), 16 columns per vector. Where
// there are none of bf16, both halves of a pair are widened, 6 operands at a time beside 16 sums, so that a block is 2
// vectors wide.
//
// Register block: 8 rows x 3 vectors. A step over 4 bytes of K loads 3 vectors of weights and broadcasts 8 times 4 bytes
// of x for 24 dot products, 12 cycles of a processor with two such units; 24 sums, 3 weights and 1 broadcast fit the 32
// registers. The 8 rows of x stay in the first-level cache (9 KB at K = 1152 in int8), the weights stream from the
// second: 192 bytes in 12 cycles.
#include "common/avx512.h"
#include "gemm/epilogue.h"
#include "gemm/multiply_avx512.h"

namespace sana {
namespace {

constexpr int kRows = 8, kVectors = 3;

template <class T>
constexpr int kMostVectors = T::kWidened ? 2 : kVectors;

// R rows from m on, V vectors of columns from n on.
template <class T, class E, int R, int V>
void product(const Gemm& p, int64_t m, int64_t n, const int* correction) {
  const int64_t bytes = row_bytes(p), stride = p.x_stride;
  const char* x = static_cast<const char*>(p.x) + m * stride;
  const char* weight = static_cast<const char*>(p.weight) + n * bytes;
  typename T::Sum sum[R][V] = {};
  multiply<T>(sum, x, stride, weight, 16 * bytes, bytes);
  for (int v = 0; v < V; ++v) {
    const Epilogue<E> finish(p, n + 16 * v);
    for (int r = 0; r < R; ++r) finish(m + r, {T::result(sum[r][v], correction[r])});
  }
}

template <class T, class E, int R>
void rows(const Gemm& p, int64_t m, const Block& block) {
  int correction[R];
  for (int r = 0; r < R; ++r)
    correction[r] = T::correction(static_cast<const char*>(p.x) + (m + r) * p.x_stride, row_bytes(p));
  int64_t n = block.first_column;
  constexpr int V = kMostVectors<T>;
  for (; n + 16 * V <= block.last_column; n += 16 * V) product<T, E, R, V>(p, m, n, correction);
  if (block.last_column - n == 32) product<T, E, R, 2>(p, m, n, correction);
  if (block.last_column - n == 16) product<T, E, R, 1>(p, m, n, correction);
}

template <class T, class E>
void block_of(const Gemm& p, const Block& block) {
  int64_t m = block.first_row;
  for (; m + kRows <= block.last_row; m += kRows) rows<T, E, kRows>(p, m, block);
  if (block.last_row - m >= 4) rows<T, E, 4>(p, m, block), m += 4;
  if (block.last_row - m >= 2) rows<T, E, 2>(p, m, block), m += 2;
  if (block.last_row - m >= 1) rows<T, E, 1>(p, m, block);
}

template <class T>
void block_of(const Gemm& p, const Block& block) {
  if (p.dtype == DType::f32) return block_of<T, F32>(p, block);
  if (p.dtype == DType::f16) return block_of<T, F16>(p, block);
  block_of<T, BF16>(p, block);
}

void block(const Gemm& p, const Block& block, char*) {
  is_int8(p) ? block_of<Int8>(p, block) : block_of<BFloat16>(p, block);
}

}  // namespace

const GemmKernels SANA_AVX512_NAME(gemm) = {kRows, 16 * kVectors, 4, 0, block};

}  // namespace sana
