// Matrix product with an epilogue: the C++ interface. The arithmetic is specified in sana_kernels/gemm/reference.py.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

// out = residual + gate * SiLU(x weight^T + bias), each part where asked for.
//
// x        M rows of K elements, bf16 or int8; a row's stride is in bytes
// weight   packed: (N / 16, K / n, 16 n) with n elements in 4 bytes, so that 64 consecutive bytes are what one vector
//          (or one row of a tile) needs of 16 columns
// N is a multiple of 16, K of 32 in bf16 and of 64 in int8.
struct Gemm {
  const void* x;
  int64_t x_stride;
  const float* x_scale;  // M floats; null: bf16 operands
  const void* weight;
  const float* weight_scale;  // N floats; null: bf16 operands
  const float* bias;          // N floats, or null
  const void* residual;       // like out, or null
  const float* gate;          // one row of N floats per image, or null: 1; `image` rows of x belong to an image
  void* out;                  // M rows of N elements
  int64_t out_stride;         // elements from row to row of out, and of residual; streamed only if a multiple of 16
  int64_t M, N, K, image;
  DType dtype;  // of out and residual
  bool silu;
  bool stream;  // out may go past the caches, if it is larger than a second-level cache: nobody reads its beginning before its end
};

inline bool is_int8(const Gemm& p) { return p.x_scale != nullptr; }
inline int64_t row_bytes(const Gemm& p) { return is_int8(p) ? p.K : 2 * p.K; }  // of x, and of a column of weight

Status gemm_cpu(const Gemm& p, int threads);

}  // namespace sana
