// The product with 4-bit weights in plain C++, for any processor: one result at a time.
#include "gemm/epilogue_portable.h"
#include "gemm/gemm_w4a16_cpu.h"

namespace sana {
namespace {

constexpr int64_t kColumns = 16;

int64_t row_bytes(const GemmW4A16& p) { return padded_k(p) * 4; }

void arrange(const GemmW4A16& p, int64_t row, void* to) {
  float* const wide = static_cast<float*>(to);
  load_row(static_cast<const char*>(p.gemm.x) + row * p.gemm.x_stride, p.x_dtype, p.gemm.K, wide);
  for (int64_t k = p.gemm.K; k < padded_k(p); ++k) wide[k] = 0;
}

float dot(const GemmW4A16& p, const float* x, int64_t n) {
  const uint8_t* bytes = p.values + n * padded_k(p) / 2;
  float total = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    float sum = 0;
    for (int64_t k = 0; k < p.group; k += 2, ++bytes, x += 2)
      sum += x[0] * float(int8_t(*bytes << 4) >> 4) + x[1] * float(int8_t(*bytes) >> 4);
    total += p.scale[n * p.groups + g] * sum;
  }
  return total;
}

void block(const GemmW4A16& p, const Block& block, const char* x, char*, float* sums) {
  const float* wide = reinterpret_cast<const float*>(x);
  for (int64_t m = block.first_row; m < block.last_row; ++m, wide += padded_k(p)) {
    for (int64_t n = block.first_column; n < block.last_column; n += kColumns) {
      const int64_t count = block.last_column - n < kColumns ? block.last_column - n : kColumns;
      for (int64_t i = 0; i < count; ++i) sums[i] = dot(p, wide, n + i);
      finish(p.gemm, m, n, count, sums);
    }
  }
}

}  // namespace

const GemmW4A16Kernels gemm_w4a16_portable = {row_bytes, arrange, block};

}  // namespace sana
