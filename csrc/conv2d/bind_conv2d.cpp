// The DC-AE's convolutions and what stands around them for Python. Shapes, dtypes and strides were checked there.
#include <array>
#include <tuple>

#include "common/bind.h"
#include "conv2d/conv2d.h"

using namespace sana;

namespace {

Band band_of(const std::array<int64_t, 4>& band) { return {band[0], band[1], band[2], band[3]}; }

// Address and number of the rows above, of the rest.
using TwoPieces = std::tuple<Optional, int64_t, Optional, int64_t>;

Rows rows_of(const TwoPieces& rows) {
  return {pointer(std::get<0>(rows)), std::get<1>(rows), pointer(std::get<2>(rows)), std::get<3>(rows)};
}

// x, residual; weight, out; weight scale, bias, weight and bias of the norm and of the input norm (float32); B, width,
// C, N; stride, kernel, phases, transformed, bytes of a weight; activation, input activation.
void py_conv2d(const TwoPieces& x, const TwoPieces& residual, const std::array<Address, 2>& tensors,
               const std::array<Optional, 6>& floats, const std::array<int64_t, 4>& shape,
               const std::array<int64_t, 4>& band, const std::array<int, 5>& kind, const std::array<int, 2>& activations,
               bool bias_by_phase, float eps, int dtype, int threads) {
  Conv2d p{};
  p.x = rows_of(x), p.residual = rows_of(residual);
  p.weight = pointer(tensors[0]), p.out = pointer(tensors[1]);
  p.weight_scale = pointer<float>(floats[0]), p.bias = pointer<float>(floats[1]);
  p.norm = {pointer<float>(floats[2]), pointer<float>(floats[3])};
  p.input_norm = {pointer<float>(floats[4]), pointer<float>(floats[5])};
  p.B = shape[0], p.width = shape[1], p.C = shape[2], p.N = shape[3];
  p.band = band_of(band);
  p.stride = kind[0], p.kernel = kind[1], p.phases = kind[2], p.transformed = kind[3] != 0, p.weight_bytes = kind[4];
  p.activation = Activation(activations[0]), p.input_activation = Activation(activations[1]);
  p.bias_by_phase = bias_by_phase;
  p.eps = eps;
  p.dtype = DType(dtype);
  call("conv2d", conv2d_cpu, p, threads);
}

// x, depthwise, grouped, out; B, rows, width, C, D, kernel.
void py_multi_scale(const std::array<Address, 4>& tensors, const std::array<int64_t, 6>& shape,
                    const std::array<int64_t, 4>& band, int dtype, int threads) {
  const MultiScale p = {pointer(tensors[0]), pointer<float>(tensors[1]), pointer<float>(tensors[2]),
                        pointer(tensors[3]), shape[0],                   shape[1],
                        shape[2],            shape[3],                   shape[4],
                        shape[5],            band_of(band),              DType(dtype)};
  call("multi_scale", multi_scale_cpu, p, threads);
}

// x, weight, bias (float32), residual, out.
void py_rms_norm(const std::array<Optional, 5>& tensors, int64_t rows, int64_t C, int dtype, int activation, float eps,
                 int threads) {
  const RmsNorm p = {pointer(tensors[0]), pointer(tensors[1]), pointer(tensors[2]), pointer(tensors[3]),
                     pointer(tensors[4]), rows,                C,                   DType(dtype),
                     Activation(activation), eps};
  call("rms_norm", rms_norm_cpu, p, threads);
}

}  // namespace

void bind_conv2d(py::module_& module) {
  module.def("conv2d", py_conv2d);
  module.def("multi_scale", py_multi_scale);
  module.def("rms_norm", py_rms_norm);
}
