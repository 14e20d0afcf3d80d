// The inner loops of ReLU linear attention on vectors; include common/avx512.h or common/avx2.h first.
// linear_attention.cpp has the algorithm.
//
// Both are small matrix products whose result stays in registers: R rows times V vectors, 14 to 28 accumulators with
// AVX-512 and 8 with AVX2 (whose 16 registers hold heads of up to 32 channels: SANA's), enough to cover the latency of
// two multiply-adds per cycle. Each step loads V vectors, broadcasts R numbers, and does R * V multiply-adds.
//   state   S[e][:] += k[t][e] * v[t][:]    rows e; the 32 tokens t of a block are summed before S returns to memory
//   apply   y[t][:] += q[t][e] * S[e][:]    rows t; then divided by relu(q) . z + eps
// With AVX-512 and BF16, bf16 keys and values enter the first product as pairs of neighbouring tokens, which does twice
// the work per instruction; relu(k) and v are bf16 numbers already (after a bf16 norm k is rounded to one, as in the
// reference), the products are exact and the sums float. The state is never rounded, so the second product is in float.
//
// The buffers (32 tokens of one head as floats, or as pairs) are padded to whole vectors with zeros and lie in L1. Rows
// of different tokens are thousands of bytes apart, too many streams for the hardware's prefetcher: a load of head h
// also prefetches head h + 2 of its token (half the time, at 1024 tokens and C = 2240).
#pragma once

#include <math.h>
#include <string.h>

#include "common/steps.h"
#include "linear_attention/linear_attention_cpu.h"

namespace sana {
namespace {

constexpr int kTokens = 32;
constexpr int kHeadsAhead = 2;

constexpr int rows_in_registers(int V) {
  if (kLanes == 16) return V <= 3 ? 8 : V <= 6 ? 4 : 2;
  return V <= 2 ? 4 : V <= 4 ? 2 : 1;
}

// The tokens of one image in q, k or v, V vectors per head.
template <class E, int V>
struct Tokens {
  using T = typename E::Type;
  static constexpr int kTail = 16 / kLanes;  // vectors of the last 16 channels, some of which may lie beyond D
  const T* data;
  int64_t token_stride, head_stride, D, H;
  Lanes tail[kTail];

  Tokens(const LinearAttention& p, const void* x, const int64_t (&stride)[3], int64_t b)
      : data(static_cast<const T*>(x) + b * stride[0]),
        token_stride(stride[1]),
        head_stride(stride[2]),
        D(p.D),
        H(p.H) {
    for (int i = 0; i < kTail; ++i) tail[i] = first_lanes(D - (V - kTail + i) * kLanes);
  }

  Lanes lanes(int v) const { return v < V - kTail ? kAllLanes : tail[v - (V - kTail)]; }

  Vec load(int64_t n, int64_t h, int v) const {
    const T* x = data + n * token_stride + h * head_stride + v * kLanes;
    if (v * kLanes * sizeof *x % 64 == 0)  // once per cache line
      _mm_prefetch(reinterpret_cast<const char*>(x + kHeadsAhead * head_stride), _MM_HINT_T0);
    return E::load(x, lanes(v));
  }

  // relu(x), or relu(norm(x)) where there is a weight. max returns its second operand for NaN.
  Vec feature(int64_t n, int64_t h, int v, const float* weight, float scale) const {
    Vec x = load(n, h, v);
    if (weight != nullptr) x = x * set1(scale) * F32::load(weight + (h * V + v) * kLanes, kAllLanes);
    return max(set1(0), x);
  }

  // Two heads at a time, so that enough sums are under way to cover the adders' latency.
  float inverse_rms(int64_t n, float eps) const {
    Vec even[V] = {}, odd[V] = {};
    const auto add = [&](int64_t h, Vec(&sums)[V]) {
      for (int v = 0; v < V; ++v) {
        const Vec x = load(n, h, v);
        sums[v] = fmadd(x, x, sums[v]);
      }
    };
    for (int64_t h = 0; h + 1 < H; h += 2) {
      add(h, even);
      add(h + 1, odd);
    }
    if (H % 2 == 1) add(H - 1, even);
    for (int v = 1; v < V; ++v) {
      even[0] += even[v];
      odd[0] += odd[v];
    }
    return 1 / sqrtf(sum(even[0] + odd[0]) / float(H * D) + eps);
  }
};

// S[e][:] += sum over `steps` of k[step][e] * v[step][:], for one head. Summed apart first: that rounds less than one
// long chain.
template <class Step, int V>
void add_to_state(const int32_t (*k)[V * kLanes], const int32_t (*v)[V * kLanes], int steps, int64_t D, float* S) {
  constexpr int R = rows_in_registers(V), kPitch = V * kLanes;
  for (int64_t e = 0; e < D; e += R) {
    Vec sums[R][V] = {};
    for (int step = 0; step < steps; ++step) {
      typename Step::Vector value[V];
      for (int c = 0; c < V; ++c) value[c] = Step::load(v[step] + c * kLanes);
      for (int r = 0; r < R; ++r) {
        const typename Step::Vector key = Step::broadcast(&k[step][e + r]);
        for (int c = 0; c < V; ++c) sums[r][c] = Step::madd(sums[r][c], key, value[c]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < V; ++c) {
        float* s = S + (e + r) * kPitch + c * kLanes;
        F32::store(s, kAllLanes, F32::load(s, kAllLanes) + sums[r][c]);
      }
    }
  }
}

// One or two tokens' vectors as the operand of a step.
inline Vec operand(FloatStep, Vec x, Vec) { return x; }
#if defined(__AVX512BF16__)
inline __m512i operand(PairStep, Vec x, Vec next) {
  return PairStep::interleave(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)),
                              reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(next)));
}
#endif

template <class E, class Step, int V>
void state(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, float* state) {
  constexpr int kPitch = V * kLanes, kStep = Step::kNumbers;
  const Tokens<E, V> keys(p, p.k, p.k_stride, b), values(p, p.v, p.v_stride, b);
  const int64_t head_floats = head_state_floats(p);
  memset(state, 0, p.H * head_floats * sizeof(float));

  alignas(64) int32_t k[kTokens / kStep][kPitch], v[kTokens / kStep][kPitch];
  float scale[kTokens] = {};
  for (int64_t start = first; start < last; start += kTokens) {
    const int count = int(last - start < kTokens ? last - start : kTokens), steps = int(ceil_div(count, kStep));
    for (int t = 0; t < count && weight != nullptr; ++t) scale[t] = keys.inverse_rms(start + t, p.norm_eps);
    for (int64_t h = 0; h < p.H; ++h) {
      float* S = state + h * head_floats;
      float* z = S + p.D * kPitch;
      for (int c = 0; c < V; ++c) {
        Vec sums = set1(0);
        for (int step = 0; step < steps; ++step) {
          const int t = step * kStep;
          const int64_t n = start + t;
          Vec next_key = set1(0), next_value = set1(0);  // an odd token's partner is zero
          if (kStep == 2 && t + 1 < count) {
            next_key = keys.feature(n + 1, h, c, weight, scale[t + 1]);
            next_value = values.load(n + 1, h, c);
          }
          const auto key = operand(Step(), keys.feature(n, h, c, weight, scale[t]), next_key);
          const auto value = operand(Step(), values.load(n, h, c), next_value);
          sums = Step::madd(sums, key, Step::one());
          Step::store(k[step] + c * kLanes, key);
          Step::store(v[step] + c * kLanes, value);
        }
        F32::store(z + c * kLanes, kAllLanes, F32::load(z + c * kLanes, kAllLanes) + sums);
      }
      add_to_state<Step, V>(k, v, steps, p.D, S);
    }
  }
}

template <class E, int V>
void apply(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, const float* state,
           void* rows) {
  constexpr int R = rows_in_registers(V), kPitch = V * kLanes;
  const Tokens<E, V> queries(p, p.q, p.q_stride, b);
  const int64_t head_floats = head_state_floats(p);

  alignas(64) float q[kTokens][kPitch] = {};
  float normaliser[kTokens], scale[kTokens] = {};
  for (int64_t start = first; start < last; start += kTokens) {
    const int count = int(last - start < kTokens ? last - start : kTokens);
    for (int t = 0; t < count && weight != nullptr; ++t) scale[t] = queries.inverse_rms(start + t, p.norm_eps);
    for (int64_t h = 0; h < p.H; ++h) {
      const float* S = state + h * head_floats;
      const float* z = S + p.D * kPitch;
      for (int t = 0; t < count; ++t) {
        Vec sums = set1(0);
        for (int c = 0; c < V; ++c) {
          const Vec query = queries.feature(start + t, h, c, weight, scale[t]);
          F32::store(q[t] + c * kLanes, kAllLanes, query);
          sums = fmadd(query, F32::load(z + c * kLanes, kAllLanes), sums);
        }
        normaliser[t] = sum(sums) + p.eps;
      }
      for (int t = 0; t < count; t += R) {
        Vec y[R][V] = {};
        for (int64_t e = 0; e < p.D; ++e) {
          Vec row[V];
          for (int c = 0; c < V; ++c) row[c] = F32::load(S + e * kPitch + c * kLanes, kAllLanes);
          for (int r = 0; r < R; ++r) {
            const Vec query = set1(q[t + r][e]);
            for (int c = 0; c < V; ++c) y[r][c] = fmadd(query, row[c], y[r][c]);
          }
        }
        for (int r = 0; r < R && t + r < count; ++r) {
          typename E::Type* out = static_cast<typename E::Type*>(rows) + ((start - first + t + r) * p.H + h) * p.D;
          for (int c = 0; c < V; ++c) E::store(out + c * kLanes, queries.lanes(c), y[r][c] / set1(normaliser[t + r]));
        }
      }
    }
  }
}

template <int V>
struct Vectors {
  static constexpr int count = V;
};

// f(Vectors<V>()) for the V vectors that a head takes: those of 16 floats, 1 to 8 times.
template <int kTimes = 1, class F>
void with_vectors(const LinearAttention& p, F f) {
  if constexpr (kTimes < 8)
    if (state_pitch(p) > kTimes * 16) return with_vectors<kTimes + 1>(p, f);
  f(Vectors<kTimes * 16 / kLanes>());
}

// `BF16Step`: what multiplies keys and values of bf16.
template <class BF16Step>
void state_any(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, float* out) {
  with_vectors(p, [&](auto vectors) {
    constexpr int V = decltype(vectors)::count;
    if (p.dtype == DType::f32) return state<F32, FloatStep, V>(p, weight, b, first, last, out);
    if (p.dtype == DType::f16) return state<F16, FloatStep, V>(p, weight, b, first, last, out);
    // A norm with float weights leaves k in float, and rounding it to bf16 would be a rounding too many.
    const bool float_keys = weight != nullptr && p.k_norm_dtype == DType::f32;
    if (float_keys) return state<BF16, FloatStep, V>(p, weight, b, first, last, out);
    state<BF16, BF16Step, V>(p, weight, b, first, last, out);
  });
}

inline void apply_any(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last,
                      const float* in, void* out) {
  with_vectors(p, [&](auto vectors) {
    constexpr int V = decltype(vectors)::count;
    if (p.dtype == DType::f32) return apply<F32, V>(p, weight, b, first, last, in, out);
    if (p.dtype == DType::f16) return apply<F16, V>(p, weight, b, first, last, in, out);
    apply<BF16, V>(p, weight, b, first, last, in, out);
  });
}

}  // namespace
}  // namespace sana
