// quantize in plain C++, for any processor.
#include "gemm/quantize_portable.h"

#include "gemm/quantize_cpu.h"

namespace sana {
namespace {

constexpr int64_t kPart = 256;  // elements that are widened at a time

void rows(const Quantize& p, int64_t first, int64_t last) {
  float part[kPart];
  for (int64_t row = first; row < last; ++row) {
    int8_t* const values = p.values + row * quantized_pitch(p.K);
    // f(part, k, count) for every part of the row.
    const auto for_parts = [&](auto f) {
      for (int64_t k = 0; k < p.K; k += kPart) {
        const int64_t count = p.K - k < kPart ? p.K - k : kPart;
        load_row(at(p.x, row * p.stride + k, p.dtype), p.dtype, count, part);
        f(k, count);
      }
    };
    Largest largest;
    for_parts([&](int64_t, int64_t count) { largest.see(part, count); });
    const RowScale scale = row_scale(largest.get());
    for_parts([&](int64_t k, int64_t count) { to_int8(part, count, scale.inverse, values + k); });
    memset(values + p.K, 0, quantized_pitch(p.K) - p.K);
    p.scale[row] = scale.scale;
  }
}

}  // namespace

const QuantizeKernels quantize_portable = {rows};

}  // namespace sana
