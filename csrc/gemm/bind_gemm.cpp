// gemm for Python. Shapes, dtypes and strides were checked there.
#include <array>

#include "common/bind.h"
#include "gemm/gemm.h"
#include "gemm/gemm_w4a16.h"

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
  p.M = shape[0], p.N = p.out_stride = shape[1], p.K = shape[2], p.image = shape[3];
  p.dtype = DType(dtype);
  p.silu = silu;
  p.stream = true;
  call("gemm", gemm_cpu, p, threads);
}

// x, its stride in bytes and dtype; values and scale of the weight, groups in a row and their size; the rest as above.
void py_gemm_w4a16(Address x, int64_t x_stride, int x_dtype, const std::array<Address, 2>& weight,
                   const std::array<int64_t, 2>& groups, Address out, const std::array<int64_t, 4>& shape,
                   const std::array<Optional, 2>& floats, Optional residual, int dtype, bool silu, int threads) {
  Gemm gemm{};
  gemm.x = pointer(x);
  gemm.x_stride = x_stride;
  gemm.bias = pointer<float>(floats[0]);
  gemm.gate = pointer<float>(floats[1]);
  gemm.residual = pointer(residual);
  gemm.out = pointer(out);
  gemm.M = shape[0], gemm.N = gemm.out_stride = shape[1], gemm.K = shape[2], gemm.image = shape[3];
  gemm.dtype = DType(dtype);
  gemm.silu = silu;
  const GemmW4A16 p = {gemm,      DType(x_dtype), pointer<uint8_t>(weight[0]), pointer<float>(weight[1]),
                       groups[0], groups[1]};
  call("gemm_w4a16", gemm_w4a16_cpu, p, threads);
}

}  // namespace

void bind_gemm(py::module_& module) {
  module.def("gemm", py_gemm);
  module.def("gemm_w4a16", py_gemm_w4a16);
}
