// gemm for Python. Shapes, dtypes and strides were checked there.
#include <array>

#include "common/bind.h"
#include "gemm/gemm.h"

using namespace sana;

namespace {

// x, weight, out; x's stride in bytes; M, N, K, rows per image; scales of x and weight, bias, gate (float32); residual.
void py_gemm(Address x, Address weight, Address out, int64_t x_stride, const std::array<int64_t, 4>& shape,
             const std::array<Optional, 4>& floats, Optional residual, int dtype, bool silu, int threads) {
  Gemm p{};
  p.x = pointer(x);
  p.x_stride = x_stride;
  p.x_scale = pointer<float>(floats[0]);
  p.weight = pointer(weight);
  p.weight_scale = pointer<float>(floats[1]);
  p.bias = pointer<float>(floats[2]);
  p.gate = pointer<float>(floats[3]);
  p.residual = pointer(residual);
  p.out = pointer(out);
  p.M = shape[0], p.N = shape[1], p.K = shape[2], p.image = shape[3];
  p.dtype = DType(dtype);
  p.silu = silu;
  p.stream = true;
  call("gemm", gemm_cpu, p, threads);
}

}  // namespace

void bind_gemm(py::module_& module) { module.def("gemm", py_gemm); }
