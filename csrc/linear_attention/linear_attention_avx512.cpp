// The inner loops of ReLU linear attention for AVX-512. linear_attention.cpp has the algorithm.
//
// Both are small matrix products whose result stays in registers: R rows times V vectors of 16 lanes, 14 to 28
// accumulators, enough to cover the latency of two multiply-adds per cycle. Each step loads V vectors, broadcasts R
// scalars, and does R * V multiply-adds.
//   state   S[e][:] += k[t][e] * v[t][:]    rows e; the 32 tokens t of a block are summed before S returns to memory
//   apply   y[t][:] += q[t][e] * S[e][:]    rows t; then divided by relu(q) . z + eps
// bf16 keys and values enter the first product as pairs of neighbouring tokens through VDPBF16PS, which does twice the
// work per instruction; relu(k) and v are bf16 numbers already (after a bf16 norm k is rounded to one, as in the
// reference), the products are exact and the sums float. The state is never rounded, so the second product is in float.
//
// The buffers (32 tokens of one head as floats, or as pairs) are padded to whole vectors with zeros and lie in L1. Rows
// of different tokens are thousands of bytes apart, too many streams for the hardware's prefetcher: a load of head h
// also prefetches head h + 2 of its token (half the time, at 1024 tokens and C = 2240).
#include <math.h>
#include <string.h>

#include "common/avx512.h"
#include "linear_attention/linear_attention_cpu.h"

namespace sana {
namespace {

constexpr int kTokens = 32;
constexpr int kHeadsAhead = 2;

constexpr int rows_in_registers(int V) { return V <= 3 ? 8 : V <= 6 ? 4 : 2; }

// What one step of the state's product multiplies: one token as floats, or two tokens as pairs of bf16.
struct Single {
  static constexpr int kTokensPerStep = 1;
  static __m512 madd(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static __m512i one() { return _mm512_castps_si512(_mm512_set1_ps(1)); }
};

struct Pair {
  static constexpr int kTokensPerStep = 2;
  static __m512 madd(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static __m512i one() { return _mm512_set1_epi32(0x3f803f80); }
};

// Lane i: x[i] rounded to bf16 in the low half, y[i] in the high half.
__m512i pair(__m512 x, __m512 y) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The tokens of one image in q, k or v, V vectors per head.
template <class E, int V>
struct Tokens {
  const typename E::Type* data;
  int64_t token_stride, head_stride, H;
  __mmask16 last_lanes;  // of a head's last vector

  Tokens(const LinearAttention& p, const void* x, const int64_t (&stride)[3], int64_t b)
      : data(static_cast<const typename E::Type*>(x) + b * stride[0]), token_stride(stride[1]), head_stride(stride[2]),
        H(p.H), last_lanes(first_lanes(p.D - (V - 1) * kLanes)) {}

  __m512 load(int64_t n, int64_t h, int v) const {
    const typename E::Type* x = data + n * token_stride + h * head_stride + v * kLanes;
    if (v * kLanes * sizeof *x % 64 == 0)  // once per cache line
      _mm_prefetch(reinterpret_cast<const char*>(x + kHeadsAhead * head_stride), _MM_HINT_T0);
    return E::load(x, v == V - 1 ? last_lanes : __mmask16(0xffff));
  }

  // relu(x), or relu(norm(x)) where there is a weight. max returns its second operand for NaN.
  __m512 feature(int64_t n, int64_t h, int v, const float* weight, float scale) const {
    __m512 x = load(n, h, v);
    if (weight != nullptr) {
      x = _mm512_mul_ps(x, _mm512_set1_ps(scale));
      x = _mm512_mul_ps(x, _mm512_loadu_ps(weight + (h * V + v) * kLanes));
    }
    return _mm512_max_ps(_mm512_setzero_ps(), x);
  }

  // Two heads at a time, so that enough sums are under way to cover the adders' latency.
  float inverse_rms(int64_t n, int64_t D, float eps) const {
    __m512 even[V] = {}, odd[V] = {};
    const auto add = [&](int64_t h, __m512 (&sum)[V]) {
      for (int v = 0; v < V; ++v) {
        const __m512 x = load(n, h, v);
        sum[v] = _mm512_fmadd_ps(x, x, sum[v]);
      }
    };
    for (int64_t h = 0; h + 1 < H; h += 2) {
      add(h, even);
      add(h + 1, odd);
    }
    if (H % 2 == 1) add(H - 1, even);
    for (int v = 1; v < V; ++v) {
      even[0] = _mm512_add_ps(even[0], even[v]);
      odd[0] = _mm512_add_ps(odd[0], odd[v]);
    }
    return 1 / sqrtf(_mm512_reduce_add_ps(_mm512_add_ps(even[0], odd[0])) / float(H * D) + eps);
  }
};

// S[e][:] += sum over `steps` of k[step][e] * v[step][:], for one head. Summed apart first: that rounds less than one
// long chain.
template <class Step, int V>
void add_to_state(const int32_t (*k)[V * kLanes], const int32_t (*v)[V * kLanes], int steps, int64_t D, float* S) {
  constexpr int R = rows_in_registers(V), kPitch = V * kLanes;
  for (int64_t e = 0; e < D; e += R) {
    __m512 sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < V; ++c) sum[r][c] = _mm512_setzero_ps();
    for (int step = 0; step < steps; ++step) {
      __m512i value[V];
      for (int c = 0; c < V; ++c) value[c] = _mm512_loadu_si512(v[step] + c * kLanes);
      for (int r = 0; r < R; ++r) {
        const __m512i key = _mm512_set1_epi32(k[step][e + r]);
        for (int c = 0; c < V; ++c) sum[r][c] = Step::madd(sum[r][c], key, value[c]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < V; ++c) {
        float* s = S + (e + r) * kPitch + c * kLanes;
        _mm512_storeu_ps(s, _mm512_add_ps(_mm512_loadu_ps(s), sum[r][c]));
      }
    }
  }
}

template <class E, class Step, int V>
void state(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, float* state) {
  constexpr int kPitch = V * kLanes, kStep = Step::kTokensPerStep;
  const Tokens<E, V> keys(p, p.k, p.k_stride, b), values(p, p.v, p.v_stride, b);
  const int64_t head_floats = head_state_floats(p);
  memset(state, 0, p.H * head_floats * sizeof(float));

  alignas(64) int32_t k[kTokens / kStep][kPitch], v[kTokens / kStep][kPitch];
  float scale[kTokens] = {};
  for (int64_t start = first; start < last; start += kTokens) {
    const int count = int(last - start < kTokens ? last - start : kTokens), steps = (count + kStep - 1) / kStep;
    for (int t = 0; t < count && weight != nullptr; ++t) scale[t] = keys.inverse_rms(start + t, p.D, p.norm_eps);
    for (int64_t h = 0; h < p.H; ++h) {
      float* S = state + h * head_floats;
      float* z = S + p.D * kPitch;
      for (int c = 0; c < V; ++c) {
        __m512 sum = _mm512_setzero_ps();
        for (int step = 0; step < steps; ++step) {
          const int t = step * kStep;
          const int64_t n = start + t;
          __m512i key, value;
          if constexpr (kStep == 1) {
            key = _mm512_castps_si512(keys.feature(n, h, c, weight, scale[t]));
            value = _mm512_castps_si512(values.load(n, h, c));
          } else {
            const bool both = t + 1 < count;  // an odd token's partner is zero
            const __m512 zero = _mm512_setzero_ps();
            key = pair(keys.feature(n, h, c, weight, scale[t]),
                       both ? keys.feature(n + 1, h, c, weight, scale[t + 1]) : zero);
            value = pair(values.load(n, h, c), both ? values.load(n + 1, h, c) : zero);
          }
          sum = Step::madd(sum, key, Step::one());
          _mm512_store_si512(k[step] + c * kLanes, key);
          _mm512_store_si512(v[step] + c * kLanes, value);
        }
        _mm512_storeu_ps(z + c * kLanes, _mm512_add_ps(_mm512_loadu_ps(z + c * kLanes), sum));
      }
      add_to_state<Step, V>(k, v, steps, p.D, S);
    }
  }
}

template <class E, int V>
void apply(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, const float* state) {
  constexpr int R = rows_in_registers(V), kPitch = V * kLanes;
  const Tokens<E, V> queries(p, p.q, p.q_stride, b);
  const int64_t head_floats = head_state_floats(p);

  alignas(64) float q[kTokens][kPitch] = {};
  float normaliser[kTokens], scale[kTokens] = {};
  for (int64_t start = first; start < last; start += kTokens) {
    const int count = int(last - start < kTokens ? last - start : kTokens);
    for (int t = 0; t < count && weight != nullptr; ++t) scale[t] = queries.inverse_rms(start + t, p.D, p.norm_eps);
    for (int64_t h = 0; h < p.H; ++h) {
      const float* S = state + h * head_floats;
      const float* z = S + p.D * kPitch;
      for (int t = 0; t < count; ++t) {
        __m512 sum = _mm512_setzero_ps();
        for (int c = 0; c < V; ++c) {
          const __m512 query = queries.feature(start + t, h, c, weight, scale[t]);
          _mm512_store_ps(q[t] + c * kLanes, query);
          sum = _mm512_fmadd_ps(query, _mm512_loadu_ps(z + c * kLanes), sum);
        }
        normaliser[t] = _mm512_reduce_add_ps(sum) + p.eps;
      }
      for (int t = 0; t < count; t += R) {
        __m512 y[R][V];
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < V; ++c) y[r][c] = _mm512_setzero_ps();
        for (int64_t e = 0; e < p.D; ++e) {
          __m512 row[V];
          for (int c = 0; c < V; ++c) row[c] = _mm512_loadu_ps(S + e * kPitch + c * kLanes);
          for (int r = 0; r < R; ++r) {
            const __m512 query = _mm512_set1_ps(q[t + r][e]);
            for (int c = 0; c < V; ++c) y[r][c] = _mm512_fmadd_ps(query, row[c], y[r][c]);
          }
        }
        for (int r = 0; r < R && t + r < count; ++r) {
          typename E::Type* out = static_cast<typename E::Type*>(p.out) + ((b * p.N + start + t + r) * p.H + h) * p.D;
          for (int c = 0; c < V; ++c)
            E::store(out + c * kLanes, c == V - 1 ? queries.last_lanes : __mmask16(0xffff),
                     _mm512_div_ps(y[r][c], _mm512_set1_ps(normaliser[t + r])));
        }
      }
    }
  }
}

// Calls f<V>() for the V vectors that a head takes.
template <template <int> class F, class... Args>
void with_vectors(const LinearAttention& p, Args... args) {
  switch (state_pitch(p) / kLanes) {
    case 1: return F<1>::run(p, args...);
    case 2: return F<2>::run(p, args...);
    case 3: return F<3>::run(p, args...);
    case 4: return F<4>::run(p, args...);
    case 5: return F<5>::run(p, args...);
    case 6: return F<6>::run(p, args...);
    case 7: return F<7>::run(p, args...);
    default: return F<8>::run(p, args...);
  }
}

template <int V>
struct State {
  static void run(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, float* out) {
    if (p.dtype == DType::f32) return state<F32, Single, V>(p, weight, b, first, last, out);
    if (p.dtype == DType::f16) return state<F16, Single, V>(p, weight, b, first, last, out);
    // A norm with float weights leaves k in float, and rounding it to bf16 would be a rounding too many.
    const bool float_keys = weight != nullptr && p.k_norm_dtype == DType::f32;
    if (float_keys) return state<BF16, Single, V>(p, weight, b, first, last, out);
    state<BF16, Pair, V>(p, weight, b, first, last, out);
  }
};

template <int V>
struct Apply {
  static void run(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last,
                  const float* in) {
    if (p.dtype == DType::f32) return apply<F32, V>(p, weight, b, first, last, in);
    if (p.dtype == DType::f16) return apply<F16, V>(p, weight, b, first, last, in);
    apply<BF16, V>(p, weight, b, first, last, in);
  }
};

}  // namespace

const LinearAttentionKernels linear_attention_avx512 = {
    with_vectors<State, const float*, int64_t, int64_t, int64_t, float*>,
    with_vectors<Apply, const float*, int64_t, int64_t, int64_t, const float*>};

}  // namespace sana
