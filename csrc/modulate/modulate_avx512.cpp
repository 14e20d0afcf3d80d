// Adaptive layer norm and gated residual for AVX-512: 16 elements at a time, four sums at once to cover the adders'
// latency.
#include <math.h>

#include "common/avx512.h"
#include "modulate/modulate_cpu.h"

namespace sana {
namespace {

// The sum of f(x) over a row; f takes a vector and the mask of its lanes.
template <class E, class F>
float sum_of(const typename E::Type* x, int64_t C, F f) {
  constexpr int kSums = 4;
  __m512 sum[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kLanes <= C; c += kSums * kLanes)
    for (int i = 0; i < kSums; ++i)
      sum[i] = _mm512_add_ps(sum[i], f(E::load(x + c + i * kLanes, 0xffff), __mmask16(0xffff)));
  for (; c < C; c += kLanes) {
    const __mmask16 lanes = first_lanes(C - c);
    sum[0] = _mm512_add_ps(sum[0], f(E::load(x + c, lanes), lanes));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

template <class E>
void modulate(const Modulate& p, const float* shift, const float* scale, int64_t b, int64_t first, int64_t last) {
  using T = typename E::Type;
  for (int64_t n = first; n < last; ++n) {
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + n * p.x.stride[1];
    T* out = static_cast<T*>(p.out) + (b * p.N + n) * p.C;
    const __m512 mean = _mm512_set1_ps(sum_of<E>(x, p.C, [](__m512 v, __mmask16) { return v; }) / float(p.C));
    const float squares = sum_of<E>(x, p.C, [&](__m512 v, __mmask16 lanes) {
      const __m512 centred = _mm512_maskz_sub_ps(lanes, v, mean);
      return _mm512_mul_ps(centred, centred);
    });
    const __m512 rstd = _mm512_set1_ps(1 / sqrtf(squares / float(p.C) + p.eps));
    for (int64_t c = 0; c < p.C; c += kLanes) {
      const __mmask16 lanes = first_lanes(p.C - c);
      const __m512 y = _mm512_mul_ps(_mm512_sub_ps(E::load(x + c, lanes), mean), rstd);
      const __m512 s = _mm512_maskz_loadu_ps(lanes, scale + c), t = _mm512_maskz_loadu_ps(lanes, shift + c);
      E::store(out + c, lanes, _mm512_fmadd_ps(y, s, t));
    }
  }
}

template <class E>
void gate_residual(const GateResidual& p, const float* gate, int64_t b, int64_t first, int64_t last) {
  using T = typename E::Type;
  for (int64_t n = first; n < last; ++n) {
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + n * p.x.stride[1];
    const T* y = static_cast<const T*>(p.y.data) + b * p.y.stride[0] + n * p.y.stride[1];
    T* out = static_cast<T*>(p.out) + (b * p.N + n) * p.C;
    for (int64_t c = 0; c < p.C; c += kLanes) {
      const __mmask16 lanes = first_lanes(p.C - c);
      const __m512 g = _mm512_maskz_loadu_ps(lanes, gate + c);
      E::store(out + c, lanes, _mm512_fmadd_ps(g, E::load(y + c, lanes), E::load(x + c, lanes)));
    }
  }
}

void modulate_any(const Modulate& p, const float* shift, const float* scale, int64_t b, int64_t first, int64_t last) {
  if (p.dtype == DType::f32) return modulate<F32>(p, shift, scale, b, first, last);
  if (p.dtype == DType::f16) return modulate<F16>(p, shift, scale, b, first, last);
  modulate<BF16>(p, shift, scale, b, first, last);
}

void gate_residual_any(const GateResidual& p, const float* gate, int64_t b, int64_t first, int64_t last) {
  if (p.dtype == DType::f32) return gate_residual<F32>(p, gate, b, first, last);
  if (p.dtype == DType::f16) return gate_residual<F16>(p, gate, b, first, last);
  gate_residual<BF16>(p, gate, b, first, last);
}

}  // namespace

const ModulateKernels modulate_avx512 = {modulate_any, gate_residual_any};

}  // namespace sana
