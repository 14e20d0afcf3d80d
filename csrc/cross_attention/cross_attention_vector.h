// The inner loops of cross_attention on vectors; include common/avx512.h or common/avx2.h first. cross_attention.cpp
// has the algorithm.
//
// Both products, of queries with keys and of probabilities with values, are the same small matrix product: R rows times
// C vectors of sums stay in registers; a step loads C vectors, broadcasts R numbers and does R * C multiply-adds. What
// a step multiplies is a `Step`: one float, or with AVX-512 and BF16 a pair of bf16. What multiplies the steps is a
// `Multiply`: vectors, or tiles (cross_attention_amx.cpp). Packed memory holds columns of kLanes units of 32 bits, each
// (steps, kLanes), so that a product reads C streams from front to back:
//     keys     a column is kLanes text tokens (zero beyond the length), a step is one or two channels
//     values   a column is kLanes channels (zero beyond D), a step is one or two text tokens
// The steps of a column are a multiple of Multiply::kSteps, filled up with zeros.
#pragma once

#include <math.h>
#include <string.h>

#include "common/steps.h"
#include "cross_attention/cross_attention_cpu.h"

namespace sana {
namespace {

constexpr int kMaxD = 128;
constexpr int kKeys = 320;  // text tokens of a block

// A step of one float.
template <int kStepsInChain>
struct Float : FloatStep {
  static constexpr int kChain = kStepsInChain;

  // Probabilities of tokens l, l + 1, ... where the scores were.
  static void store_probabilities(int32_t* row, int64_t l, Vec p) { store(row + l, p); }
  // D numbers as units.
  template <class E>
  static void load_row(const typename E::Type* x, int64_t D, int32_t* row) {
    for (int64_t d = 0; d < D; d += kLanes)
      F32::store(reinterpret_cast<float*>(row) + d, first_lanes(D - d), E::load(x + d, first_lanes(D - d)));
  }
  // The channels d, d + 1, ... of a step's tokens.
  template <class E>
  static Vector pack_values(const typename E::Type* const (&tokens)[1], int64_t d, Lanes lanes) {
    return E::load(tokens[0] + d, lanes);
  }
};

#if defined(__AVX512BF16__)
// A step of two bf16.
struct Pair : PairStep {
  static constexpr int kChain = kKeys;

  // Half the size of the scores that they replace, from the first on: nothing is overwritten before it is read.
  static void store_probabilities(int32_t* row, int64_t l, Vec p) {
    BF16::store(reinterpret_cast<uint16_t*>(row) + l, kAllLanes, p);
  }
  template <class E>
  static void load_row(const uint16_t* x, int64_t D, int32_t* row) {
    memcpy(row, x, D * sizeof *x);
  }
  template <class E>
  static Vector pack_values(const uint16_t* const (&tokens)[2], int64_t d, Lanes lanes) {
    return interleave(_mm256_maskz_loadu_epi16(lanes, tokens[0] + d), _mm256_maskz_loadu_epi16(lanes, tokens[1] + d));
  }
};
#endif

// Rows times packed columns: sums[t][c], of row t and the vector of columns c, become the sum over the steps of
// a[t][step] * b[c][step], plus themselves where they are `added` to.
struct Product {
  const int32_t *a, *b;
  int64_t a_pitch, b_pitch;  // units from a row to the next, from a column to the next
  int64_t rows, columns, steps;
  float* sums;
  int64_t pitch;
  bool added;
};

// The product on vectors.
template <class S>
struct OnVectors {
  using Step = S;
  static constexpr int kSteps = 1;
  static constexpr int kRows = 6;                        // R
  static constexpr int kQueries = 2 * kRows;             // whose scores are in the L1 cache at a time
  static constexpr int kColumns = kLanes == 16 ? 4 : 2;  // C at most: with R, 24 of 32 or 12 of 16 registers

  // kRows rows from `row` on, C columns from `column` on. Every Step::kChain steps are summed apart first, which rounds
  // less than one long chain.
  template <int C>
  static void block(const Product& q, int64_t row, int64_t column) {
    const int32_t* const a = q.a + row * q.a_pitch;
    const int32_t* const b = q.b + column * q.b_pitch;
    Vec total[kRows][C] = {};
    for (int64_t step = 0; step < q.steps;) {
      const int64_t end = q.steps - step < Step::kChain ? q.steps : step + Step::kChain;
      Vec sum[kRows][C] = {};
      for (; step < end; ++step) {
        typename Step::Vector load[C];
        for (int c = 0; c < C; ++c) load[c] = Step::load(b + c * q.b_pitch + step * kLanes);
        for (int r = 0; r < kRows; ++r) {
          const typename Step::Vector one = Step::broadcast(a + r * q.a_pitch + step);
          for (int c = 0; c < C; ++c) sum[r][c] = Step::madd(sum[r][c], one, load[c]);
        }
      }
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < C; ++c) total[r][c] += sum[r][c];
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < C; ++c) {
        float* const to = q.sums + (row + r) * q.pitch + (column + c) * kLanes;
        F32::store(to, kAllLanes, q.added ? F32::load(to, kAllLanes) + total[r][c] : total[r][c]);
      }
    }
  }

  template <int C>
  static void block_of(int64_t columns, const Product& q, int64_t row, int64_t column) {
    if constexpr (C > 1)
      if (columns < C) return block_of<C - 1>(columns, q, row, column);
    block<C>(q, row, column);
  }

  // The columns in nearly equal parts of at most kColumns: few sums would wait for each other.
  static void multiply(const Product& q) {
    for (int64_t row = 0; row < q.rows; row += kRows) {
      int64_t column = 0;
      for (int64_t parts = ceil_div(q.columns, kColumns); parts > 0; --parts) {
        const int64_t count = ceil_div(q.columns - column, parts);
        block_of<kColumns>(count, q, row, column);
        column += count;
      }
    }
  }
};

// Operands of 16 bits are so coarse that the roundings of long sums vanish beside theirs.
using Single = OnVectors<Float<8>>;
using Widened = OnVectors<Float<kKeys>>;

// Sizes of a head's packed memory; values follow keys.
template <class Multiply>
struct Packed {
  using Step = typename Multiply::Step;
  int64_t length, key_columns, key_steps, value_columns, value_steps;

  static int64_t steps(int64_t numbers) { return round_up(ceil_div(numbers, Step::kNumbers), Multiply::kSteps); }

  Packed(const CrossAttention& p, int64_t length)
      : length(length),
        key_columns(ceil_div(length, kLanes)),
        key_steps(steps(p.D)),
        value_columns(ceil_div(p.D, kLanes)),
        value_steps(steps(length)) {}

  int64_t keys() const { return key_columns * key_steps * kLanes; }
  int64_t units() const { return keys() + value_columns * value_steps * kLanes; }
};

template <class Multiply>
int64_t packed_bytes(const CrossAttention& p) {
  return round_up(Packed<Multiply>(p, p.L).units(), 16) * 4;
}

template <class E, class Multiply>
void pack(const CrossAttention& p, int64_t b, int64_t h, void* memory) {
  using T = typename E::Type;
  using Step = typename Multiply::Step;
  const Packed<Multiply> packed(p, length_of(p, b));
  const T* k = static_cast<const T*>(p.k) + b * p.k_stride[0] + h * p.k_stride[2];
  const T* v = static_cast<const T*>(p.v) + b * p.v_stride[0] + h * p.v_stride[2];
  int32_t* to = static_cast<int32_t*>(memory);

  int32_t rows[kLanes][kMaxD] = {};
  for (int64_t l = 0; l < packed.length; l += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      if (l + i < packed.length)
        Step::template load_row<E>(k + (l + i) * p.k_stride[1], p.D, rows[i]);
      else
        memset(rows[i], 0, sizeof rows[i]);
    }
    for (int64_t step = 0; step < packed.key_steps; ++step)
      for (int64_t i = 0; i < kLanes; ++i) *to++ = rows[i][step];
  }

  const T zeros[kMaxD] = {};
  for (int64_t d = 0; d < p.D; d += kLanes) {
    for (int64_t l = 0; l < packed.value_steps * Step::kNumbers; l += Step::kNumbers, to += kLanes) {
      const T* tokens[Step::kNumbers];
      for (int64_t i = 0; i < Step::kNumbers; ++i)
        tokens[i] = l + i < packed.length ? v + (l + i) * p.v_stride[1] : zeros;
      Step::store(to, Step::template pack_values<E>(tokens, d, first_lanes(p.D - d)));
    }
  }
}

// One query of the online softmax.
struct Softmax {
  float largest = -INFINITY, sum = 0, factor = 1;
};

// Turns `count` scores into probabilities in place, as steps of the next product; zeros fill a vector, and `padded` numbers.
template <class E, class Step>
void softmax(int32_t* row, int64_t count, int64_t padded, float scale, Softmax& state) {
  float* const scores = reinterpret_cast<float*>(row);
  const auto score = [&](int64_t l) { return F32::load(scores + l, kAllLanes); };
  const Vec lowest = set1(-INFINITY);
  Vec most = lowest;
  for (int64_t l = 0; l < count; l += kLanes) most = max(most, select(first_lanes(count - l), score(l), lowest));
  const float before = state.largest, now = largest(most);
  state.largest = now > before ? now : before;
  // A 16-bit result asks for no more than 2^x in 16 bits; float for exp.
  const bool in_16 = sizeof(typename E::Type) == 2;
  const Vec unit = set1(in_16 ? scale * kLog2E : scale), shift = set1(state.largest);
  const auto probability = [&](Vec s) { return in_16 ? exp2_16((s - shift) * unit) : exp((s - shift) * unit); };
  Vec sums = set1(0);
  int64_t l = 0;
  for (; l < count; l += kLanes) {
    const Vec p = select(first_lanes(count - l), probability(score(l)), set1(0));
    sums += p;
    Step::store_probabilities(row, l, p);
  }
  for (; l < padded; l += kLanes) Step::store_probabilities(row, l, set1(0));
  state.factor = expf((before - state.largest) * scale);
  state.sum = state.sum * state.factor + sum(sums);
}

template <class E, class Multiply>
void attend(const CrossAttention& p, int64_t b, int64_t h, int64_t first, int64_t last, const void* memory, void* rows) {
  using T = typename E::Type;
  using Step = typename Multiply::Step;
  constexpr int kQueries = Multiply::kQueries;
  const Packed<Multiply> packed(p, length_of(p, b));
  const int32_t* const keys = static_cast<const int32_t*>(memory);
  const int32_t* const values = keys + packed.keys();
  const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + h * p.q_stride[2];
  const float scale = 1 / sqrtf(float(p.D));

  alignas(64) int32_t queries[kQueries][kMaxD] = {}, scores[kQueries][kKeys];
  alignas(64) float y[kQueries][kMaxD];
  for (int64_t start = first; start < last; start += kQueries) {
    const int64_t count = last - start < kQueries ? last - start : kQueries;
    for (int64_t t = 0; t < count; ++t) Step::template load_row<E>(q + (start + t) * p.q_stride[1], p.D, queries[t]);
    Softmax state[kQueries];
    for (int64_t l = 0; l < packed.length; l += kKeys) {
      const int64_t tokens = packed.length - l < kKeys ? packed.length - l : kKeys, steps = packed.steps(tokens);
      Multiply::multiply({queries[0], keys + l * packed.key_steps, kMaxD, packed.key_steps * kLanes, count,
                          ceil_div(tokens, kLanes), packed.key_steps, reinterpret_cast<float*>(scores[0]), kKeys, false});
      for (int64_t t = 0; t < count; ++t) {
        softmax<E, Step>(scores[t], tokens, steps * Step::kNumbers, scale, state[t]);
        for (int64_t d = 0; l > 0 && d < p.D; d += kLanes)
          F32::store(y[t] + d, kAllLanes, F32::load(y[t] + d, kAllLanes) * set1(state[t].factor));
      }
      Multiply::multiply({scores[0], values + l / Step::kNumbers * kLanes, kKeys, packed.value_steps * kLanes, count,
                          packed.value_columns, steps, y[0], kMaxD, l > 0});
    }
    for (int64_t t = 0; t < count; ++t) {
      T* out = static_cast<T*>(rows) + ((start - first + t) * p.H + h) * p.D;
      const Vec inverse = set1(1 / state[t].sum);
      for (int64_t d = 0; d < p.D; d += kLanes)
        E::store(out + d, first_lanes(p.D - d), F32::load(y[t] + d, kAllLanes) * inverse);
    }
  }
}

// `BF16Multiply`: what multiplies bf16.
template <class BF16Multiply>
int64_t packed_bytes_any(const CrossAttention& p) {
  return p.dtype == DType::bf16 ? packed_bytes<BF16Multiply>(p) : packed_bytes<Single>(p);
}

template <class BF16Multiply>
void pack_any(const CrossAttention& p, int64_t b, int64_t h, void* packed) {
  if (p.dtype == DType::f32) return pack<F32, Single>(p, b, h, packed);
  if (p.dtype == DType::f16) return pack<F16, Widened>(p, b, h, packed);
  pack<BF16, BF16Multiply>(p, b, h, packed);
}

template <class BF16Multiply>
void attend_any(const CrossAttention& p, int64_t b, int64_t h, int64_t first, int64_t last, const void* packed,
                void* rows) {
  if (p.dtype == DType::f32) return attend<F32, Single>(p, b, h, first, last, packed, rows);
  if (p.dtype == DType::f16) return attend<F16, Widened>(p, b, h, first, last, packed, rows);
  attend<BF16, BF16Multiply>(p, b, h, first, last, packed, rows);
}

}  // namespace
}  // namespace sana
