// The module sana_kernels._cpu: addresses and sizes from Python to the CPU kernels. Shapes, dtypes and strides were
// checked in Python.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <vector>

#include "common/bind.h"
#include "common/build_info.h"
#include "common/cpu_features.h"
#include "cross_attention/cross_attention.h"
#include "gemm/quantize.h"
#include "linear_attention/bind_linear_attention.h"
#include "mix_ffn/depthwise_glu.h"
#include "modulate/bind_modulate.h"

using namespace sana;

void bind_conv2d(py::module_& module);   // csrc/conv2d
void bind_gemm(py::module_& module);     // csrc/gemm
void bind_mix_ffn(py::module_& module);  // csrc/mix_ffn
void bind_peak(py::module_& module);     // csrc/peak

std::string sana::failure(Status status) { return status_text(status); }

namespace {

// `out_scale` here and below: None for a result in the dtype of q, x or h.
void py_linear_attention(const std::array<Address, 4>& qkv_out, Optional out_scale,
                         const std::array<int64_t, 4>& shape, const std::array<std::array<int64_t, 3>, 3>& strides,
                         int dtype, const std::array<Typed, 2>& norms, float norm_eps, float eps, int threads) {
  LinearAttention p = linear_attention_args(qkv_out, shape, strides, dtype, norms, norm_eps, eps);
  p.row_scale = pointer<float>(out_scale);
  call("linear_attention", linear_attention_cpu, p, threads);
}

void py_cross_attention(const std::array<Address, 4>& qkv_out, Optional out_scale,
                        const std::optional<std::vector<int64_t>>& lengths, const std::array<int64_t, 5>& shape,
                        const std::array<std::array<int64_t, 3>, 3>& strides, int dtype, int threads) {
  CrossAttention p = {};
  p.q = pointer(qkv_out[0]), p.k = pointer(qkv_out[1]), p.v = pointer(qkv_out[2]), p.out = pointer(qkv_out[3]);
  p.lengths = lengths ? lengths->data() : nullptr;
  p.B = shape[0], p.N = shape[1], p.L = shape[2], p.H = shape[3], p.D = shape[4];
  std::copy_n(strides[0].begin(), 3, p.q_stride);
  std::copy_n(strides[1].begin(), 3, p.k_stride);
  std::copy_n(strides[2].begin(), 3, p.v_stride);
  p.dtype = DType(dtype);
  p.row_scale = pointer<float>(out_scale);
  call("cross_attention", cross_attention_cpu, p, threads);
}

void py_modulate(const Tokens& x, const Row& shift, const Row& scale, Address out, Optional out_scale,
                 const std::array<int64_t, 3>& shape, int dtype, float eps, int threads) {
  const Modulate p = {token_rows(x), image_rows(shift), image_rows(scale), pointer(out), shape[0],
                      shape[1],      shape[2],          DType(dtype),      eps,          pointer<float>(out_scale)};
  call("modulate", modulate_cpu, p, threads);
}

void py_gate_residual(const Tokens& x, const Tokens& y, const Row& gate, Address out,
                      const std::array<int64_t, 3>& shape, int dtype, int threads) {
  const GateResidual p = {token_rows(x), token_rows(y), image_rows(gate), pointer(out),
                          shape[0],      shape[1],      shape[2],         DType(dtype)};
  call("gate_residual", gate_residual_cpu, p, threads);
}

void py_quantize(Address x, Address values, Address scale, int64_t rows, int64_t K, int64_t stride, int dtype,
                 int threads) {
  const Quantize p = {pointer(x), pointer<int8_t>(values), pointer<float>(scale), rows, K, stride, DType(dtype)};
  call("quantize", quantize_cpu, p, threads);
}

// pointers: h, weight, bias, out; dtypes: of h, weight and bias.
void py_depthwise_glu(const std::array<Address, 4>& pointers, Optional out_scale, const std::array<int64_t, 4>& shape,
                      const std::array<int, 3>& dtypes, int threads) {
  const auto [h, weight, bias, out] = pointers;
  const DepthwiseGlu p = {pointer(h),       pointer(weight), pointer(bias), pointer(out), pointer<float>(out_scale),
                          shape[0],         shape[1],        shape[2],      shape[3],     DType(dtypes[0]),
                          DType(dtypes[1]), DType(dtypes[2])};
  call("depthwise_glu", depthwise_glu_cpu, p, threads);
}

std::string unknown_isa(const std::string& what) {
  return what + " is not known; choose portable, avx2, avxvnni, avx512vnni, avx512 or amx";
}

void py_set_isa_cap(const std::string& name) {
  if (!set_isa_cap(name.c_str())) throw std::invalid_argument(unknown_isa("instruction set " + name));
}

}  // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
  if (const char* name = std::getenv("SANA_KERNELS_ISA"); name != nullptr && *name != 0 && !set_isa_cap(name))
    throw py::import_error(unknown_isa(std::string("SANA_KERNELS_ISA=") + name));
  module.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(sana_build_info()); },
      "Versions, flags and targets of this build, as a dict.");
  module.def("isa", [] { return isa_name(active_isa()); }, "The instruction set that kernels use now.");
  module.def("set_isa_cap", py_set_isa_cap, py::arg("name"),
             "Use at most portable | avx2 | avxvnni | avx512vnni | avx512 | amx from now on; SANA_KERNELS_ISA sets the"
             " first cap.");
  module.def("linear_attention", py_linear_attention);
  module.def("cross_attention", py_cross_attention);
  module.def("modulate", py_modulate);
  module.def("gate_residual", py_gate_residual);
  module.def("quantize", py_quantize);
  module.def("depthwise_glu", py_depthwise_glu);
  bind_conv2d(module);
  bind_gemm(module);
  bind_mix_ffn(module);
  bind_peak(module);
}
