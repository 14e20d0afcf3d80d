// Matrix product on vectors of 8 columns, for AVX2 and for AVX-VNNI, which differ in how they multiply int8.
//
// Panel: 16 columns of weights, brought once per task into the form that the inner loop reads (AVX2 has to widen them),
// in a buffer of a core's second-level cache; all rows of the task then pass it. Register block: R rows x 2 vectors in
// bf16, chosen per type so that sums, weights and one broadcast fit 16 registers.
#pragma once

#include "common/avx2.h"
#include "gemm/epilogue.h"

namespace sana {
namespace {

constexpr int kPanel = 16;    // columns
constexpr int kScratch = 32;  // bytes of the buffer for each byte of a row: what both types take

inline int load_int(const char* x) {
  int value;
  memcpy(&value, x, sizeof value);
  return value;
}

// Widened to float, two vectors for each k; so bf16 runs at the rate of fp32. Per 2 of K and row: 1 broadcast, 2 shifts
// and masks, 4 multiply-adds.
struct BFloat16 {
  static constexpr int kRows = 6, kSums = 2;
  static constexpr int kBytes = 2 * kPanel * 4;  // of a panel, for each 4 bytes of K
  using Sum = Vec;

  static Sum zero() { return _mm256_setzero_ps(); }

  static const char* panel(const char* weight, int64_t bytes, char* buffer) {
    const __m256i odd = _mm256_set1_epi32(int(0xffff0000));
    for (int64_t k = 0; k < bytes; k += 4, weight += 64, buffer += kBytes) {
      for (int half = 0; half < 2; ++half) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + 32 * half));
        _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + 32 * half), _mm256_slli_epi32(pairs, 16));
        _mm256_store_si256(reinterpret_cast<__m256i*>(buffer + 64 + 32 * half), _mm256_and_si256(pairs, odd));
      }
    }
    return buffer - bytes / 4 * kBytes;
  }

  template <int R>
  static void step(Sum (&sum)[R][kSums], const char* panel, const char* x, int64_t stride) {
    for (int j = 0; j < 2; ++j) {
      const Vec w0 = _mm256_load_ps(reinterpret_cast<const float*>(panel + 64 * j));
      const Vec w1 = _mm256_load_ps(reinterpret_cast<const float*>(panel + 64 * j + 32));
      for (int r = 0; r < R; ++r) {
        const int pair = load_int(x + r * stride);
        const Vec value = _mm256_castsi256_ps(_mm256_set1_epi32(j == 0 ? pair << 16 : pair & int(0xffff0000)));
        sum[r][0] = fmadd(value, w0, sum[r][0]);
        sum[r][1] = fmadd(value, w1, sum[r][1]);
      }
    }
  }

  static Vec result(const Sum (&sum)[kSums], int half, int) { return sum[half]; }
  static int correction(const char*, int64_t) { return 0; }
};

// R rows from m on, the 16 columns of a panel from n on.
template <class T, class E, int R>
void product(const Gemm& p, int64_t m, int64_t n, const char* panel, const int* correction) {
  const int64_t bytes = row_bytes(p), stride = p.x_stride;
  const char* x = static_cast<const char*>(p.x) + m * stride;
  typename T::Sum sum[R][T::kSums];
  for (auto& row : sum)
    for (auto& s : row) s = T::zero();
  for (int64_t k = 0; k < bytes; k += 4) T::template step<R>(sum, panel + k / 4 * T::kBytes, x + k, stride);
  for (int half = 0; half < 2; ++half) {
    const Columns columns(p, n + 8 * half);
    for (int r = 0; r < R; ++r)
      finish<E>(p, m + r, n + 8 * half, columns, T::result(sum[r], half, correction[r]));
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

template <class Int8>
void block_by(const Gemm& p, const Block& block, char* buffer) {
  is_int8(p) ? block_of<Int8>(p, block, buffer) : block_of<BFloat16>(p, block, buffer);
}

}  // namespace
}  // namespace sana
