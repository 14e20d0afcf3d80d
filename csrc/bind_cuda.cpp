// The module sana_kernels._cuda: addresses and sizes from Python to the CUDA kernels, nothing else. What a caller may
// pass is checked in Python; a launch that CUDA refuses raises RuntimeError in CUDA's own words.
#include <array>
#include <tuple>

#include "common/bind.h"
#include "common/build_info.h"
#include "common/cuda_status.h"
#include "conv2d/conv2d_cuda.h"
#include "gemm/gemm_cuda.h"
#include "linear_attention/bind_linear_attention.h"
#include "mix_ffn/depthwise_glu_cuda.h"
#include "modulate/bind_modulate.h"
#include "modulate/modulate_cuda.h"

using namespace sana;

std::string sana::failure(Status status) {
  return status == Status::cuda_error ? std::string("CUDA: ") + cuda_error_text() : status_text(status);
}

namespace {

using EightBit = std::tuple<Address, Address, int64_t, bool>;  // values, scale, values in a row, fp8

QuantizedRows quantized_rows(const EightBit& rows) {
  const auto [values, scale, width, fp8] = rows;
  return {pointer(values), pointer<float>(scale), width, fp8};
}

void py_modulate(const Tokens& x, const Row& shift, const Row& scale, Address out,
                 const std::optional<EightBit>& quantized, const std::array<int64_t, 3>& shape, int dtype, float eps,
                 Address stream) {
  const Modulate p = {token_rows(x), image_rows(shift), image_rows(scale), pointer(out), shape[0],
                      shape[1],      shape[2],          DType(dtype),      eps};
  call("modulate", modulate_cuda, p, quantized ? quantized_rows(*quantized) : QuantizedRows{}, pointer(stream));
}

void py_gate_residual(const Tokens& x, const Tokens& y, const Row& gate, Address out,
                      const std::array<int64_t, 3>& shape, int dtype, Address stream) {
  const GateResidual p = {token_rows(x), token_rows(y), image_rows(gate), pointer(out),
                          shape[0],      shape[1],      shape[2],         DType(dtype)};
  call("gate_residual", gate_residual_cuda, p, pointer(stream));
}

void py_quantize(Address x, const std::array<int64_t, 3>& shape, int dtype, const EightBit& out, Address stream) {
  const Quantize p = {pointer(x), shape[0], shape[1], shape[2], DType(dtype)};
  call("quantize", quantize_cuda, p, quantized_rows(out), pointer(stream));
}

void py_depthwise_glu(const std::array<Address, 4>& pointers, const std::array<int64_t, 4>& shape,
                      const std::array<int64_t, 2>& weight_strides, const std::array<int, 3>& dtypes, Address stream) {
  const auto [h, weight, bias, out] = pointers;
  const DepthwiseGluArgs p = {pointer(h),        pointer(weight),   pointer(bias),    pointer(out),
                              shape[0],          shape[1],          shape[2],         shape[3],
                              weight_strides[0], weight_strides[1], DType(dtypes[0]), DType(dtypes[1]),
                              DType(dtypes[2])};
  call("depthwise_glu", depthwise_glu_cuda, p, pointer(stream));
}

Values values(const Typed& given) { return given ? Values{pointer(given->first), DType(given->second)} : Values{}; }

// What follows a product: scales of x and weight (0: none), bias, gate and its stride, residual and its strides, out,
// SiLU, `vectors`.
using EpilogueArgs = std::tuple<Address, Address, Typed, Typed, int64_t, Typed, std::array<int64_t, 2>,
                                std::pair<Address, int>, bool, bool>;

// shape: M, N, rows of one image.
Epilogue epilogue(const EpilogueArgs& args, const std::array<int64_t, 3>& shape) {
  const auto& [x_scale, weight_scale, bias, gate, gate_stride, residual, residual_stride, out, silu, vectors] = args;
  Epilogue e = {};
  e.x_scale = pointer<float>(x_scale);
  e.weight_scale = pointer<float>(weight_scale);
  e.bias = values(bias);
  e.gate = values(gate);
  e.gate_stride = gate_stride;
  e.residual = values(residual);
  e.residual_stride[0] = residual_stride[0], e.residual_stride[1] = residual_stride[1];
  e.out = pointer(out.first);
  e.dtype = DType(out.second);
  e.silu = silu;
  e.vectors = vectors;
  e.M = shape[0], e.N = shape[1], e.image = shape[2];
  return e;
}

void py_gemm_w8a8(Address x, Address weight, int64_t K, const std::array<int64_t, 3>& shape, const EpilogueArgs& args,
                  int tile, Address stream) {
  const GemmW8A8 p = {pointer(x), pointer(weight), K, tile, epilogue(args, shape)};
  call("gemm_w8a8", gemm_w8a8_cuda, p, pointer(stream));
}

using Int4Args = std::tuple<Address, Address, int64_t>;                    // values, scale, groups of a row
using Branch = std::optional<std::tuple<Address, Address, int64_t, int>>;  // low, up, rank, dtype; or None

Int4Rows int4_rows(const Int4Args& rows) {
  const auto [values, scale, groups] = rows;
  return {pointer(values), pointer<float>(scale), groups};
}

void py_quantize_int4(Address x, const Typed& smooth, const std::array<int64_t, 3>& shape, int dtype, Address out,
                      Address scale, Address stream) {
  const QuantizeInt4 p = {pointer(x), values(smooth), shape[0],     shape[1],
                          shape[2],   DType(dtype),   pointer(out), pointer<float>(scale)};
  call("quantize_int4", quantize_int4_cuda, p, pointer(stream));
}

void py_gemm_w4a4(const Int4Args& x, const Int4Args& weight, const Branch& branch, const std::array<int64_t, 3>& shape,
                  const EpilogueArgs& args, bool large, Address stream) {
  const auto [low, up, rank, dtype] = branch.value_or(std::tuple(Address{0}, Address{0}, int64_t{0}, int(DType::bf16)));
  const GemmW4A4 p = {int4_rows(x), int4_rows(weight), pointer(low), pointer(up),
                      rank,         DType(dtype),      large,        epilogue(args, shape)};
  call("gemm_w4a4", gemm_w4a4_cuda, p, pointer(stream));
}

void py_gemm_w4a16(Address x, int dtype, int64_t K, int64_t group, const Int4Args& weight,
                   const std::array<int64_t, 3>& shape, const EpilogueArgs& args, Address stream) {
  const GemmW4A16 p = {pointer(x), DType(dtype), K, group, int4_rows(weight), epilogue(args, shape)};
  call("gemm_w4a16", gemm_w4a16_cuda, p, pointer(stream));
}

void py_rms_norm(const std::array<Address, 5>& pointers, const std::array<int64_t, 2>& shape, int dtype, int activation,
                 float eps, Address stream) {
  const auto [x, weight, bias, residual, out] = pointers;
  const RmsNorm p = {pointer(x), pointer(weight), pointer(bias), pointer(residual),      pointer(out),
                     shape[0],   shape[1],        DType(dtype),  Activation(activation), eps};
  call("rms_norm", rms_norm_cuda, p, pointer(stream));
}

void py_upsample_shuffle(const std::array<Address, 4>& pointers, const std::array<int64_t, 5>& shape, int dtype,
                         Address stream) {
  const auto [phases, x, bias, out] = pointers;
  const UpsampleShuffle p = {pointer(phases), pointer(x), pointer(bias), pointer(out), shape[0],
                             shape[1],        shape[2],   shape[3],      shape[4],     DType(dtype)};
  call("upsample_shuffle", upsample_shuffle_cuda, p, pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
  module.def("refusal", cuda_refusal, "Why the current GPU and its driver cannot load these kernels; None where they can.");
  module.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(sana_build_info()); },
      "Versions, flags and targets of this build, as a dict.");

  module.def(
      "linear_attention_scratch",
      [](const std::array<int64_t, 4>& shape, bool norm) {
        LinearAttention p = linear_attention_args({}, shape, {}, 0, {}, 0, 0);
        if (norm) p.q_norm = &p;
        return linear_attention_cuda_scratch(p);
      },
      py::arg("shape"), py::arg("norm"), "Floats of scratch memory that linear_attention needs.");

  module.def(
      "linear_attention",
      [](const std::array<Address, 4>& pointers, const std::array<int64_t, 4>& shape,
         const std::array<std::array<int64_t, 3>, 3>& strides, int dtype, const std::array<Typed, 2>& norms,
         float norm_eps, float eps, Address scratch, Address stream) {
        const LinearAttention p = linear_attention_args(pointers, shape, strides, dtype, norms, norm_eps, eps);
        call("linear_attention", linear_attention_cuda, p, pointer<float>(scratch), pointer(stream));
      },
      py::arg("pointers"), py::arg("shape"), py::arg("strides"), py::arg("dtype"), py::arg("norms"),
      py::arg("norm_eps"), py::arg("eps"), py::arg("scratch"), py::arg("stream"),
      "pointers: q, k, v, out; shape: (B, N, H, D); strides: of B, N, H for q, k, v; norms: (address, dtype) or None.");

  module.def("modulate", py_modulate, py::arg("x"), py::arg("shift"), py::arg("scale"), py::arg("out"),
             py::arg("quantized"), py::arg("shape"), py::arg("dtype"), py::arg("eps"), py::arg("stream"));
  module.def("gate_residual", py_gate_residual, py::arg("x"), py::arg("y"), py::arg("gate"), py::arg("out"),
             py::arg("shape"), py::arg("dtype"), py::arg("stream"));
  module.def("quantize", py_quantize, py::arg("x"), py::arg("shape"), py::arg("dtype"), py::arg("out"),
             py::arg("stream"), "shape: rows, values in a row, stride of a row.");
  module.def("gemm_w8a8", py_gemm_w8a8, py::arg("x"), py::arg("weight"), py::arg("K"), py::arg("shape"),
             py::arg("epilogue"), py::arg("tile"), py::arg("stream"), "shape: M, N, rows of one image.");
  module.def("quantize_int4", py_quantize_int4, py::arg("x"), py::arg("smooth"), py::arg("shape"), py::arg("dtype"),
             py::arg("values"), py::arg("scale"), py::arg("stream"), "shape: rows, values in a row, stride of a row.");
  module.def("gemm_w4a4", py_gemm_w4a4, py::arg("x"), py::arg("weight"), py::arg("branch"), py::arg("shape"),
             py::arg("epilogue"), py::arg("large"), py::arg("stream"), "shape: M, N, rows of one image.");
  module.def("gemm_w4a16", py_gemm_w4a16, py::arg("x"), py::arg("dtype"), py::arg("K"), py::arg("group"),
             py::arg("weight"), py::arg("shape"), py::arg("epilogue"), py::arg("stream"),
             "shape: M, N, rows of one image.");
  module.def("rms_norm", py_rms_norm, py::arg("pointers"), py::arg("shape"), py::arg("dtype"), py::arg("activation"),
             py::arg("eps"), py::arg("stream"), "pointers: x, weight, bias, residual, out; shape: (rows, C).");
  module.def("upsample_shuffle", py_upsample_shuffle, py::arg("pointers"), py::arg("shape"), py::arg("dtype"),
             py::arg("stream"), "pointers: phases, x, bias, out; shape: (B, H, W, C, repeats).");
  module.def("depthwise_glu", py_depthwise_glu, py::arg("pointers"), py::arg("shape"), py::arg("weight_strides"),
             py::arg("dtypes"), py::arg("stream"),
             "pointers: h, weight, bias, out; shape: (B, height, width, F); weight_strides: of channel and of tap;"
             " dtypes: h, weight, bias.");
}
