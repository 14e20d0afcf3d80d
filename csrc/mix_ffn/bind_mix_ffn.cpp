// mix_ffn for Python. Shapes, dtypes and strides were checked there.
#include <array>

#include "common/bind.h"
#include "mix_ffn/mix_ffn.h"

using namespace sana;

namespace {

// x and its row stride in bytes; expand, project; weight and bias of the depthwise convolution with their dtypes; scales
// of x, expand and project, bias of expand, gate (float32); residual; out and its dtype; B, height, width, C, F.
void py_mix_ffn(Address x, int64_t x_stride, const std::array<Address, 2>& matrices,
                const std::array<Address, 2>& depthwise, const std::array<int, 2>& depthwise_dtypes,
                const std::array<Optional, 5>& floats, Optional residual, Address out, int dtype,
                const std::array<int64_t, 5>& shape, int threads) {
  MixFfn p{};
  p.x = pointer(x);
  p.x_stride = x_stride;
  p.x_scale = pointer<float>(floats[0]);
  p.expand = pointer(matrices[0]);
  p.expand_scale = pointer<float>(floats[1]);
  p.expand_bias = pointer<float>(floats[3]);
  p.depthwise_weight = pointer(depthwise[0]);
  p.depthwise_bias = pointer(depthwise[1]);
  p.depthwise_weight_dtype = DType(depthwise_dtypes[0]);
  p.depthwise_bias_dtype = DType(depthwise_dtypes[1]);
  p.project = pointer(matrices[1]);
  p.project_scale = pointer<float>(floats[2]);
  p.gate = pointer<float>(floats[4]);
  p.residual = pointer(residual);
  p.out = pointer(out);
  p.dtype = DType(dtype);
  p.B = shape[0], p.height = shape[1], p.width = shape[2], p.C = shape[3], p.F = shape[4];
  call("mix_ffn", mix_ffn_cpu, p, threads);
}

}  // namespace

void bind_mix_ffn(py::module_& module) { module.def("mix_ffn", py_mix_ffn); }
