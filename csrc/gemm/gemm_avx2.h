// Matrix product on vectors of 8 columns, for AVX2 and for AVX-VNNI, which differ in how they multiply int8.
//
// Panel: 16 columns of weights in the form that the inner loop reads (AVX2 has to widen them), some panels at a time, in
// a buffer of a core's second-level cache. All rows of the task then pass these panels, 6 at a time, which are
// widened once for all of them. Register block: 6 rows x 2 vectors, so that sums, weights and one broadcast fit 16
// registers.
#pragma once

#include "common/avx2.h"
#include "gemm/epilogue.h"
#include "gemm/multiply_avx2.h"

namespace sana {
namespace {

// Panels that rows which were widened pass together, at most: about half of the second-level cache.
constexpr int64_t kTogether = 8;
constexpr int kBuffer = kTogether * kScratch + BFloat16::kTimes * BFloat16::kRows;  // rows of x: panels, widened rows

// R rows from m on, the 16 columns of a panel from n on; x as the inner loop reads it.
template <class T, class E, int R>
void product(const Gemm& p, int64_t m, int64_t n, const char* x, int64_t stride, const char* panel,
             const int* correction) {
  typename T::Sum sum[R][T::kSums];
  for (auto& row : sum)
    for (auto& s : row) s = T::zero();
  multiply<typename T::Multiplied>(sum, x, stride, panel, T::kTimes * row_bytes(p));
  for (int half = 0; half < 2; ++half) {
    const Epilogue<E> finish(p, n + 8 * half);
    for (int r = 0; r < R; ++r) finish(m + r, {T::result(sum[r], half, correction[r])});
  }
}

// R rows from m on, of `count` panels from column n on.
template <class T, class E, int R>
void rows_of(const Gemm& p, int64_t m, int64_t n, const char* const* panels, int64_t count, char* widened,
             const int* correction) {
  const int64_t bytes = row_bytes(p);
  const char* x = static_cast<const char*>(p.x) + m * p.x_stride;
  int64_t stride = p.x_stride;
  if constexpr (T::kTimes > 1) {
    stride = T::kTimes * bytes + kLine;  // a power of 2 of bytes apart, rows would meet in a few sets of the cache
    for (int r = 0; r < R; ++r) T::widen(x + r * p.x_stride, bytes, widened + r * stride);
    x = widened;
  }
  for (int64_t i = 0; i < count; ++i) product<T, E, R>(p, m, n + kPanel * i, x, stride, panels[i], correction);
}

template <class T, class E>
void block_of(const Gemm& p, const Block& block, char* buffer) {
  const int64_t bytes = row_bytes(p), first = block.first_row, fitting = block.cache / 2 / (kScratch * bytes);
  const int64_t together = T::kTimes == 1 || fitting < 1 ? 1 : fitting < kTogether ? fitting : kTogether;
  char* const widened = buffer + kTogether * kScratch * bytes;
  int* const correction = reinterpret_cast<int*>(buffer + kBuffer * (bytes + kLine));
  for (int64_t m = first; m < block.last_row; ++m)
    correction[m - first] = T::correction(static_cast<const char*>(p.x) + m * p.x_stride, bytes);
  for (int64_t n = block.first_column, count; n < block.last_column; n += kPanel * count) {
    const int64_t left = ceil_div(block.last_column - n, kPanel);
    count = left < together ? left : together;
    const char* panels[kTogether];
    for (int64_t i = 0; i < count; ++i)
      panels[i] = T::panel(static_cast<const char*>(p.weight) + (n + kPanel * i) * bytes, bytes,
                           buffer + i * kScratch * bytes);
    int64_t m = first;
    for (; m + T::kRows <= block.last_row; m += T::kRows)
      rows_of<T, E, T::kRows>(p, m, n, panels, count, widened, correction + (m - first));
    for (; m < block.last_row; ++m) rows_of<T, E, 1>(p, m, n, panels, count, widened, correction + (m - first));
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
