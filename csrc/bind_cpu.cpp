// The module sana_kernels._cpu: addresses and sizes from Python to the CPU kernels. Shapes, dtypes and strides were
// checked in Python; here the GIL is released and a status becomes an exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/build_info.h"
#include "common/cpu_features.h"
#include "cross_attention/cross_attention.h"
#include "gemm/quantize.h"
#include "linear_attention/bind_linear_attention.h"
#include "mix_ffn/depthwise_glu.h"
#include "modulate/modulate.h"

namespace py = pybind11;
using namespace sana;

void bind_gemm(py::module_& module);     // csrc/gemm
void bind_mix_ffn(py::module_& module);  // csrc/mix_ffn
void bind_peak(py::module_& module);     // csrc/peak

namespace {

using Row = std::tuple<Address, int64_t, int>;  // (B, C): address, stride of B, dtype
using Strides2 = std::array<int64_t, 2>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

float* floats(Address address) { return static_cast<float*>(pointer(address)); }

void raise_unless_ok(const char* op, Status status) {
  if (status != Status::ok) throw std::runtime_error(std::string(op) + ": " + status_text(status));
}

void py_linear_attention(const std::array<Address, 4>& qkv_out, const std::array<int64_t, 4>& shape,
                         const std::array<std::array<int64_t, 3>, 3>& strides, int dtype,
                         const std::array<NormWeight, 2>& norms, float norm_eps, float eps, int threads) {
  const LinearAttention p = linear_attention_args(qkv_out, shape, strides, dtype, norms, norm_eps, eps);
  py::gil_scoped_release release;
  raise_unless_ok("linear_attention", linear_attention_cpu(p, threads));
}

void py_cross_attention(const std::array<Address, 4>& qkv_out, const std::optional<std::vector<int64_t>>& lengths,
                        const std::array<int64_t, 5>& shape, const std::array<std::array<int64_t, 3>, 3>& strides,
                        int dtype, int threads) {
  CrossAttention p = {};
  p.q = pointer(qkv_out[0]), p.k = pointer(qkv_out[1]), p.v = pointer(qkv_out[2]), p.out = pointer(qkv_out[3]);
  p.lengths = lengths ? lengths->data() : nullptr;
  p.B = shape[0], p.N = shape[1], p.L = shape[2], p.H = shape[3], p.D = shape[4];
  std::copy_n(strides[0].begin(), 3, p.q_stride);
  std::copy_n(strides[1].begin(), 3, p.k_stride);
  std::copy_n(strides[2].begin(), 3, p.v_stride);
  p.dtype = DType(dtype);
  py::gil_scoped_release release;
  raise_unless_ok("cross_attention", cross_attention_cpu(p, threads));
}

ImageRows image_rows(const Row& row) { return {pointer(std::get<0>(row)), std::get<1>(row), DType(std::get<2>(row))}; }

TokenRows token_rows(Address x, const Strides2& strides) { return {pointer(x), {strides[0], strides[1]}}; }

// `out_scale`: null for a result in the dtype of x.
void py_modulate(Address x, Address out, Address out_scale, const std::array<int64_t, 3>& shape,
                 const Strides2& strides, int dtype, const Row& shift, const Row& scale, float eps, int threads) {
  const Modulate p = {token_rows(x, strides),
                      image_rows(shift),
                      image_rows(scale),
                      pointer(out),
                      shape[0],
                      shape[1],
                      shape[2],
                      DType(dtype),
                      eps,
                      floats(out_scale)};
  py::gil_scoped_release release;
  raise_unless_ok("modulate", modulate_cpu(p, threads));
}

void py_gate_residual(Address x, Address y, Address out, const std::array<int64_t, 3>& shape, const Strides2& x_strides,
                      const Strides2& y_strides, int dtype, const Row& gate, int threads) {
  const GateResidual p = {token_rows(x, x_strides),
                          token_rows(y, y_strides),
                          image_rows(gate),
                          pointer(out),
                          shape[0],
                          shape[1],
                          shape[2],
                          DType(dtype)};
  py::gil_scoped_release release;
  raise_unless_ok("gate_residual", gate_residual_cpu(p, threads));
}

void py_quantize(Address x, Address values, Address scale, int64_t rows, int64_t K, int64_t stride, int dtype,
                 int threads) {
  const Quantize p = {pointer(x), static_cast<int8_t*>(pointer(values)), floats(scale), rows, K, stride, DType(dtype)};
  py::gil_scoped_release release;
  raise_unless_ok("quantize", quantize_cpu(p, threads));
}

// `out_scale`: null for a result in the dtype of h. dtypes: of h, weight and bias.
void py_depthwise_glu(Address h, Address weight, Address bias, Address out, Address out_scale,
                      const std::array<int64_t, 4>& shape, const std::array<int, 3>& dtypes, int threads) {
  const DepthwiseGlu p = {pointer(h),        pointer(weight),  pointer(bias),    pointer(out),
                          floats(out_scale), shape[0],         shape[1],         shape[2],
                          shape[3],          DType(dtypes[0]), DType(dtypes[1]), DType(dtypes[2])};
  py::gil_scoped_release release;
  raise_unless_ok("depthwise_glu", depthwise_glu_cpu(p, threads));
}

std::string unknown_isa(const std::string& what) {
  return what + " is not known; choose portable, avx2, avxvnni, avx512 or amx";
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
             "Use at most portable | avx2 | avxvnni | avx512 | amx from now on; SANA_KERNELS_ISA sets the first cap.");
  module.def("linear_attention", py_linear_attention);
  module.def("cross_attention", py_cross_attention);
  module.def("modulate", py_modulate);
  module.def("gate_residual", py_gate_residual);
  module.def("quantize", py_quantize);
  module.def("depthwise_glu", py_depthwise_glu);
  bind_gemm(module);
  bind_mix_ffn(module);
  bind_peak(module);
}
