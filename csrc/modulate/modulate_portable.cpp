// Adaptive layer norm and gated residual in plain C++, for any processor.
#include <math.h>

#include "gemm/quantize_portable.h"
#include "modulate/modulate_cpu.h"

namespace sana {
namespace {

constexpr int64_t kPart = 256;  // elements that are widened at a time

// f(values, offset, count) for every part of a row, as floats.
template <class F>
void for_parts(const void* row, DType dtype, int64_t C, F f) {
  float part[kPart];
  for (int64_t c = 0; c < C; c += kPart) {
    const int64_t count = C - c < kPart ? C - c : kPart;
    load_row(at(row, c, dtype), dtype, count, part);
    f(part, c, count);
  }
}

void modulate(const Modulate& p, const float* shift, const float* scale, int64_t b, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    const void* x = at(p.x.data, b * p.x.stride[0] + n * p.x.stride[1], p.dtype);
    double sum = 0, squares = 0;
    for_parts(x, p.dtype, p.C, [&](const float* part, int64_t, int64_t count) {
      for (int64_t i = 0; i < count; ++i) sum += part[i];
    });
    const float mean = float(sum / double(p.C));
    for_parts(x, p.dtype, p.C, [&](const float* part, int64_t, int64_t count) {
      for (int64_t i = 0; i < count; ++i) squares += (part[i] - mean) * (part[i] - mean);
    });
    const float rstd = 1 / sqrtf(float(squares / double(p.C)) + p.eps);
    const auto for_results = [&](auto f) {
      for_parts(x, p.dtype, p.C, [&](float* part, int64_t c, int64_t count) {
        for (int64_t i = 0; i < count; ++i) part[i] = (part[i] - mean) * rstd * scale[c + i] + shift[c + i];
        f(part, c, count);
      });
    };
    const int64_t row = b * p.N + n, pitch = quantized_pitch(p.C);
    if (p.row_scale == nullptr) {
      for_results([&](const float* part, int64_t c, int64_t count) {
        store_row(part, p.dtype, count, at(p.out, row * p.C + c, p.dtype));
      });
      continue;
    }
    Largest largest;
    for_results([&](const float* part, int64_t, int64_t count) { largest.see(part, count); });
    const RowScale steps = row_scale(largest.get());
    int8_t* const values = static_cast<int8_t*>(p.out) + row * pitch;
    for_results([&](const float* part, int64_t c, int64_t count) { to_int8(part, count, steps.inverse, values + c); });
    memset(values + p.C, 0, pitch - p.C);
    p.row_scale[row] = steps.scale;
  }
}

void gate_residual(const GateResidual& p, const float* gate, int64_t b, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    const void* x = at(p.x.data, b * p.x.stride[0] + n * p.x.stride[1], p.dtype);
    const void* y = at(p.y.data, b * p.y.stride[0] + n * p.y.stride[1], p.dtype);
    void* out = at(p.out, (b * p.N + n) * p.C, p.dtype);
    for_parts(x, p.dtype, p.C, [&](float* part, int64_t c, int64_t count) {
      float other[kPart];
      load_row(at(y, c, p.dtype), p.dtype, count, other);
      for (int64_t i = 0; i < count; ++i) part[i] += gate[c + i] * other[i];
      store_row(part, p.dtype, count, at(out, c, p.dtype));
    });
  }
}

}  // namespace

const ModulateKernels modulate_portable = {modulate, gate_residual};

}  // namespace sana
