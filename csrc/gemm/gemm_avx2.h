// Matrix product on vectors of 8 columns, for AVX2 and for AVX-VNNI, which differ in how they multiply int8.
//
// Panel: 16 columns of weights, brought once per task into the form that the inner loop reads (AVX2 has to widen them),
// in a buffer of a core's second-level cache; all rows of the task then pass it. Register block: R rows x 2 vectors in
// bf16, chosen per type so that sums, weights and one broadcast fit 16 registers.
#pragma once

#include "common/avx2.h"
#include "gemm/epilogue.h"
#include "gemm/multiply_avx2.h"

namespace sana {
namespace {

// R rows from m on, the 16 columns of a panel from n on.
template <class T, class E, int R>
void product(const Gemm& p, int64_t m, int64_t n, const char* panel, const int* correction) {
  const int64_t bytes = row_bytes(p), stride = p.x_stride;
  const char* x = static_cast<const char*>(p.x) + m * stride;
  typename T::Sum sum[R][T::kSums];
  for (auto& row : sum)
    for (auto& s : row) s = T::zero();
  multiply<T>(sum, x, stride, panel, bytes);
  for (int half = 0; half < 2; ++half) {
    const Epilogue<E> finish(p, n + 8 * half);
    for (int r = 0; r < R; ++r) finish(m + r, {T::result(sum[r], half, correction[r])});
  }
}

template <class T, class E>
void block_of(const Gemm& p, const Block& block, char* buffer) {
  const int64_t bytes = row_bytes(p), first = block.first_row;
  int* correction = reinterpret_cast<int*>(buffer + kScratch * bytes);
  for (int64_t m = first; m < block.last_row; ++m)
    correction[m - first] = T::correction(static_cast<const char*>(p.x) + m * p.x_stride, bytes);
  for (int64_t n = block.first_column; n < block.last_column; n += kPanel) {
    const char* panel = T::panel(static_cast<const char*>(p.weight) + n * bytes, bytes, buffer);
    int64_t m = first;
    for (; m + T::kRows <= block.last_row; m += T::kRows)
      product<T, E, T::kRows>(p, m, n, panel, correction + (m - first));
    for (; m < block.last_row; ++m) product<T, E, 1>(p, m, n, panel, correction + (m - first));
  }
}

template <class T>
void block_of(const Gemm& p, const Block& block, char* buffer) {
  if (p.dtype == DType::f32) return block_of<T, F32>(p, block, buffer);
  if (p.dtype == DType::f16) return block_of<T, F16>(p, block, buffer);
  block_of<T, BF16>(p, block, buffer);
}

void block(const Gemm& p, const Block& block, char* buffer) {
  is_int8(p) ? block_of<Int8>(p, block, buffer) : block_of<BFloat16>(p, block, buffer);
}

}  // namespace
}  // namespace sana
