// Matrix product in plain C++, for any processor: one row by 16 columns at a time.
#include <math.h>

#include "gemm/gemm_cpu.h"
#include "gemm/multiply_portable.h"

namespace sana {
namespace {

// Epilogue of 16 sums of row m, from column n on.
void finish(const Gemm& p, int64_t m, int64_t n, float* y) {
  for (int i = 0; i < kColumns; ++i) {
    if (p.x_scale != nullptr) y[i] *= p.x_scale[m] * p.weight_scale[n + i];
    if (p.bias != nullptr) y[i] += p.bias[n + i];
    if (p.silu) y[i] /= 1 + expf(-y[i]);
  }
  if (p.residual != nullptr) {
    float residual[kColumns];
    load_row(at(p.residual, m * p.out_stride + n, p.dtype), p.dtype, kColumns, residual);
    const float* gate = p.gate == nullptr ? nullptr : p.gate + m / p.image * p.N + n;
    for (int i = 0; i < kColumns; ++i) y[i] = residual[i] + (gate == nullptr ? 1 : gate[i]) * y[i];
  }
  store_row(y, p.dtype, kColumns, at(p.out, m * p.out_stride + n, p.dtype));
}

template <class T>
void block_of(const Gemm& p, const Block& block) {
  using E = typename T::Element;
  for (int64_t n = block.first_column; n < block.last_column; n += kColumns) {
    const E* weight = static_cast<const E*>(p.weight) + n * p.K;
    for (int64_t m = block.first_row; m < block.last_row; ++m) {
      const E* x = reinterpret_cast<const E*>(static_cast<const char*>(p.x) + m * p.x_stride);
      typename T::Sum sum[kColumns] = {};
      multiply<T>(sum, x, weight, p.K);
      float y[kColumns];
      for (int i = 0; i < kColumns; ++i) y[i] = float(sum[i]);
      finish(p, m, n, y);
    }
  }
}

void block(const Gemm& p, const Block& block, char*) {
  is_int8(p) ? block_of<Int8>(p, block) : block_of<BFloat16>(p, block);
}

}  // namespace

const GemmKernels gemm_portable = {1, kColumns, 4, 0, block};

}  // namespace sana
