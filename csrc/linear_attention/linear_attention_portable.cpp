// The inner loops of ReLU linear attention in plain C++: for any processor, and to read before the faster ones.
#include <math.h>
#include <string.h>

#include "linear_attention/linear_attention_cpu.h"

namespace sana {
namespace {

constexpr int64_t kTokens = 32;  // at a time: their rows of all heads should fit the L2 cache
constexpr int kMaxD = 128;

// The tokens of one image in q, k or v.
struct Tokens {
  const void* data;
  DType dtype;
  int64_t first, token_stride, head_stride;

  Tokens(const void* x, const int64_t (&stride)[3], DType dtype, int64_t b)
      : data(x), dtype(dtype), first(b * stride[0]), token_stride(stride[1]), head_stride(stride[2]) {}

  void load(int64_t n, int64_t h, int64_t D, float* row) const {
    load_row(at(data, first + n * token_stride + h * head_stride, dtype), dtype, D, row);
  }
};

// 1 / sqrt(mean square over all heads + eps)
float inverse_rms(const LinearAttention& p, const Tokens& tokens, int64_t n) {
  float row[kMaxD];
  double sum = 0;
  for (int64_t h = 0; h < p.H; ++h) {
    tokens.load(n, h, p.D, row);
    for (int64_t d = 0; d < p.D; ++d) sum += double(row[d]) * row[d];
  }
  return 1 / sqrtf(float(sum / double(p.H * p.D)) + p.norm_eps);
}

// relu(x), or relu(norm(x)) where there is a weight. The comparison lets NaN through.
void feature(const Tokens& tokens, int64_t n, int64_t h, int64_t D, const float* weight, float scale, float* row) {
  tokens.load(n, h, D, row);
  if (weight != nullptr)
    for (int64_t d = 0; d < D; ++d) row[d] = row[d] * scale * weight[d];
  for (int64_t d = 0; d < D; ++d) row[d] = row[d] < 0 ? 0 : row[d];
}

// Four floats that the compiler keeps in one register of whatever the processor has.
typedef float Float4 __attribute__((vector_size(16)));

// Y[i][j] += sum over `steps` of A[i, step] * B[step][j], for D columns and rows i < rows: the product behind both
// passes. A 4 x 8 tile of the sum stays in registers; it joins Y at the end, which rounds less than one long chain of
// sums. A has a stride for i and one for step, so that it can be read transposed.
void add_product(const float* A, int64_t A_row, int64_t A_step, const float* B, int64_t B_step, int64_t steps,
                 int64_t rows, int64_t D, float* Y, int64_t Y_row) {
  constexpr int kRows = 4, kColumns = 8, kVectors = kColumns / 4;
  for (int64_t i = 0; i < rows; i += kRows) {
    for (int64_t j = 0; j < D; j += kColumns) {
      Float4 sum[kRows][kVectors] = {}, b[kVectors];
      for (int64_t step = 0; step < steps; ++step) {
        memcpy(b, B + step * B_step + j, sizeof b);
        for (int r = 0; r < kRows; ++r)
          for (int c = 0; c < kVectors; ++c) sum[r][c] += A[(i + r) * A_row + step * A_step] * b[c];
      }
      for (int r = 0; r < kRows; ++r) {
        float* y = Y + (i + r) * Y_row + j;
        memcpy(b, y, sizeof b);
        for (int c = 0; c < kVectors; ++c) b[c] += sum[r][c];
        memcpy(y, b, sizeof b);
      }
    }
  }
}

void state(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, float* state) {
  const Tokens keys(p.k, p.k_stride, p.dtype, b), values(p.v, p.v_stride, p.dtype, b);
  const int64_t pitch = state_pitch(p), D = p.D;
  memset(state, 0, p.H * head_state_floats(p) * sizeof(float));
  float k[kTokens][kMaxD], v[kTokens][kMaxD], scale[kTokens] = {};
  for (int64_t start = first; start < last; start += kTokens) {
    const int64_t count = last - start < kTokens ? last - start : kTokens;
    for (int64_t t = 0; t < count && weight != nullptr; ++t) scale[t] = inverse_rms(p, keys, start + t);
    for (int64_t h = 0; h < p.H; ++h) {
      float* S = state + h * head_state_floats(p);
      float z[kMaxD] = {};
      for (int64_t t = 0; t < count; ++t) {
        feature(keys, start + t, h, D, weight == nullptr ? nullptr : weight + h * pitch, scale[t], k[t]);
        values.load(start + t, h, D, v[t]);
        for (int64_t e = 0; e < D; ++e) z[e] += k[t][e];
      }
      for (int64_t e = 0; e < D; ++e) S[D * pitch + e] += z[e];
      add_product(k[0], 1, kMaxD, v[0], kMaxD, count, D, D, S, pitch);
    }
  }
}

void apply(const LinearAttention& p, const float* weight, int64_t b, int64_t first, int64_t last, const float* state,
           void* out) {
  const Tokens queries(p.q, p.q_stride, p.dtype, b);
  const int64_t pitch = state_pitch(p), D = p.D;
  float q[kTokens][kMaxD] = {}, y[kTokens][kMaxD], scale[kTokens] = {};
  for (int64_t start = first; start < last; start += kTokens) {
    const int64_t count = last - start < kTokens ? last - start : kTokens;
    for (int64_t t = 0; t < count && weight != nullptr; ++t) scale[t] = inverse_rms(p, queries, start + t);
    for (int64_t h = 0; h < p.H; ++h) {
      const float* S = state + h * head_state_floats(p);
      for (int64_t t = 0; t < count; ++t)
        feature(queries, start + t, h, D, weight == nullptr ? nullptr : weight + h * pitch, scale[t], q[t]);
      memset(y, 0, sizeof y);
      add_product(q[0], kMaxD, 1, S, pitch, D, count, D, y[0], kMaxD);
      for (int64_t t = 0; t < count; ++t) {
        float normaliser = p.eps;
        for (int64_t e = 0; e < D; ++e) normaliser += q[t][e] * S[D * pitch + e];
        for (int64_t d = 0; d < D; ++d) y[t][d] /= normaliser;
        store_row(y[t], p.dtype, D, at(out, ((start - first + t) * p.H + h) * D, p.dtype));
      }
    }
  }
}

}  // namespace

const LinearAttentionKernels linear_attention_portable = {state, nullptr, apply};

}  // namespace sana
