// The product with 4-bit weights on vectors of neighbours along K; gemm_w4a16.cpp tells the algorithm. Include
// common/avx512.h, avx2.h or portable.h first, and define for each Step that is used (common/steps.h)
//     void unpack(const uint8_t* nibbles, Step::Vector& even, Step::Vector& odd)
// which makes two vectors of the kLanes * Step::kNumbers bytes at `nibbles`.
#pragma once

#include "common/steps.h"
#include "gemm/epilogue.h"
#include "gemm/gemm_w4a16_cpu.h"

namespace sana {
namespace {

constexpr int kRowBlock = 4, kColumnBlock = 4;
constexpr int kUnit = 64;  // neighbours along K that are summed before they are scaled: all groups are multiples

template <class Step>
constexpr int kBytes = kLanes * Step::kNumbers;  // of nibbles that make two vectors

// The number of 32-bit units in a row of x, or in a column of unpacked weights.
template <class Step>
int64_t units(const GemmW4A16& p) {
  return padded_k(p) / Step::kNumbers;
}

template <class Step>
int64_t row_bytes(const GemmW4A16& p) {
  return 4 * units<Step>(p);
}

// K numbers and zeros, of each 2 kBytes the even ones first.
template <class Step, class Number>
void split_even_odd(const Number* x, int64_t K, int64_t padded, Number* to) {
  constexpr int bytes = kBytes<Step>;
  for (int64_t k = 0; k < padded; k += 2 * bytes) {
    for (int i = 0; i < bytes; ++i) {
      const int64_t even = k + 2 * i;
      to[k + i] = even < K ? x[even] : Number(0);
      to[k + bytes + i] = even + 1 < K ? x[even + 1] : Number(0);
    }
  }
}

// Columns as they are stored.
template <class Step>
struct Nibbles {
  const uint8_t* values;
  int64_t pitch;

  void get(int column, int64_t k, typename Step::Vector& even, typename Step::Vector& odd) const {
    unpack(values + column * pitch + k / 2, even, odd);
  }
};

// Columns that were unpacked before, for many rows.
template <class Step>
struct Panel {
  const int32_t* values;
  int64_t pitch;

  void get(int column, int64_t k, typename Step::Vector& even, typename Step::Vector& odd) const {
    const int32_t* at = values + column * pitch + k / Step::kNumbers;
    even = Step::load(at), odd = Step::load(at + kLanes);
  }
};

// R rows of x times C columns, whose scales are at `scale`: sums, rows of kW4A16Columns.
template <class Step, int R, int C, class Weights>
void product(const GemmW4A16& p, const int32_t* x, const Weights& weights, const float* scale, float* sums) {
  const int64_t pitch = units<Step>(p);
  Vec total[R][C];
  for (auto& row : total)
    for (Vec& t : row) t = set1(0);
  int64_t k = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t end = k + p.group; k < end; k += kUnit) {
      for (int c = 0; c < C; ++c) {
        Vec dot[R];
        for (Vec& d : dot) d = set1(0);
        for (int i = 0; i < kUnit; i += 2 * kBytes<Step>) {
          typename Step::Vector even, odd;
          weights.get(c, k + i, even, odd);
          for (int r = 0; r < R; ++r) {
            const int32_t* at = x + r * pitch + (k + i) / Step::kNumbers;
            dot[r] = Step::madd(Step::madd(dot[r], Step::load(at), even), Step::load(at + kLanes), odd);
          }
        }
        const Vec s = set1(scale[c * p.groups + g]);
        for (int r = 0; r < R; ++r) total[r][c] = fmadd(s, dot[r], total[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r * kW4A16Columns + c] = sum(total[r][c]);
}

// All rows of the block times C columns.
template <class Step, int C, class Weights>
void rows(const GemmW4A16& p, int64_t count, const int32_t* x, const Weights& weights, const float* scale, float* sums) {
  const int64_t pitch = units<Step>(p);
  int64_t m = 0;
  for (; m + kRowBlock <= count; m += kRowBlock)
    product<Step, kRowBlock, C>(p, x + m * pitch, weights, scale, sums + m * kW4A16Columns);
  if (count - m >= 2) {
    product<Step, 2, C>(p, x + m * pitch, weights, scale, sums + m * kW4A16Columns);
    m += 2;
  }
  if (count - m == 1) product<Step, 1, C>(p, x + m * pitch, weights, scale, sums + m * kW4A16Columns);
}

// C columns from n on.
template <class Step, int C>
void columns(const GemmW4A16& p, int64_t n, int64_t count, const int32_t* x, int32_t* panel, float* sums) {
  const int64_t pitch = units<Step>(p), row = padded_k(p) / 2;
  const Nibbles<Step> nibbles = {p.values + n * row, row};
  const float* scale = p.scale + n * p.groups;
  if (count <= kRowBlock) return rows<Step, C>(p, count, x, nibbles, scale, sums);
  for (int c = 0; c < C; ++c) {
    for (int64_t k = 0; k < padded_k(p); k += 2 * kBytes<Step>) {
      typename Step::Vector even, odd;
      nibbles.get(c, k, even, odd);
      int32_t* to = panel + c * pitch + k / Step::kNumbers;
      Step::store(to, even), Step::store(to + kLanes, odd);
    }
  }
  rows<Step, C>(p, count, x, Panel<Step>{panel, pitch}, scale, sums);
}

template <class E>
void finish_block(const Gemm& p, const Block& block, const float* sums) {
  for_vectors(block.last_column - block.first_column, [&](int64_t i, Lanes lanes) {
    const Epilogue<E> finish(p, block.first_column + i, lanes);
    const float* sum = sums + i;
    for (int64_t m = block.first_row; m < block.last_row; ++m, sum += kW4A16Columns)
      finish(m, {F32::load(sum, lanes)});
  });
}

template <class Step>
void block_of(const GemmW4A16& p, const Block& block, const char* x, char* panel, float* sums) {
  const int64_t count = block.last_row - block.first_row, width = block.last_column - block.first_column;
  const int32_t* const first = reinterpret_cast<const int32_t*>(x);
  int32_t* const unpacked = reinterpret_cast<int32_t*>(panel);
  int64_t i = 0;
  for (; i + kColumnBlock <= width; i += kColumnBlock)
    columns<Step, kColumnBlock>(p, block.first_column + i, count, first, unpacked, sums + i);
  for (; i < width; ++i) columns<Step, 1>(p, block.first_column + i, count, first, unpacked, sums + i);
  if (p.gemm.dtype == DType::f32) return finish_block<F32>(p.gemm, block, sums);
  if (p.gemm.dtype == DType::f16) return finish_block<F16>(p.gemm, block, sums);
  finish_block<BF16>(p.gemm, block, sums);
}

inline const char* row_of(const GemmW4A16& p, int64_t row) {
  return static_cast<const char*>(p.gemm.x) + row * p.gemm.x_stride;
}

// A row of any dtype, as floats.
inline void arrange_floats(const GemmW4A16& p, int64_t row, void* arranged) {
  float* const to = static_cast<float*>(arranged);
  const int64_t K = p.gemm.K, chunk = 2 * kBytes<FloatStep>;
  for (int64_t k = 0; k < padded_k(p); k += chunk) {
    float wide[2 * kBytes<FloatStep>] = {};
    if (k < K) load_row(row_of(p, row) + k * element_size(p.x_dtype), p.x_dtype, K - k < chunk ? K - k : chunk, wide);
    split_even_odd<FloatStep>(wide, chunk, chunk, to + k);
  }
}

}  // namespace
}  // namespace sana
