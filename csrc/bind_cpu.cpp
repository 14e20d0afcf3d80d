// The module sana_kernels._cpu: addresses and sizes from Python to the CPU kernels. Shapes, dtypes and strides were
// checked in Python; here the GIL is released and a status becomes an exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/build_info.h"
#include "common/cpu_features.h"
#include "linear_attention/bind_linear_attention.h"
#include "modulate/modulate.h"

namespace py = pybind11;
using namespace sana;

void bind_peak(py::module_& module);  // csrc/peak

namespace {

using Row = std::tuple<Address, int64_t, int>;  // (B, C): address, stride of B, dtype
using Strides2 = std::array<int64_t, 2>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

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

ImageRows image_rows(const Row& row) { return {pointer(std::get<0>(row)), std::get<1>(row), DType(std::get<2>(row))}; }

TokenRows token_rows(Address x, const Strides2& strides) { return {pointer(x), {strides[0], strides[1]}}; }

void py_modulate(Address x, Address out, const std::array<int64_t, 3>& shape, const Strides2& strides, int dtype,
                 const Row& shift, const Row& scale, float eps, int threads) {
  const Modulate p = {token_rows(x, strides), image_rows(shift), image_rows(scale), pointer(out),
                      shape[0],               shape[1],          shape[2],          DType(dtype), eps};
  py::gil_scoped_release release;
  raise_unless_ok("modulate", modulate_cpu(p, threads));
}

void py_gate_residual(Address x, Address y, Address out, const std::array<int64_t, 3>& shape, const Strides2& x_strides,
                      const Strides2& y_strides, int dtype, const Row& gate, int threads) {
  const GateResidual p = {token_rows(x, x_strides), token_rows(y, y_strides), image_rows(gate), pointer(out),
                          shape[0],                 shape[1],                 shape[2],         DType(dtype)};
  py::gil_scoped_release release;
  raise_unless_ok("gate_residual", gate_residual_cpu(p, threads));
}

std::string unknown_isa(const std::string& what) {
  return what + " is not known; choose portable, avx2, avx512 or amx";
}

void py_set_isa_cap(const std::string& name) {
  if (!set_isa_cap(name.c_str())) throw std::invalid_argument(unknown_isa("instruction set " + name));
}

}  // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
  if (const char* name = std::getenv("SANA_KERNELS_ISA"); name != nullptr && *name != 0 && !set_isa_cap(name))
    throw py::import_error(unknown_isa(std::string("SANA_KERNELS_ISA=") + name));
  module.def("build_info", [] { return py::module_::import("json").attr("loads")(sana_build_info()); },
             "Versions, flags and targets of this build, as a dict.");
  module.def("isa", [] { return isa_name(active_isa()); }, "The instruction set that kernels use now.");
  module.def("set_isa_cap", py_set_isa_cap, py::arg("name"),
             "Use at most portable | avx2 | avx512 | amx from now on; SANA_KERNELS_ISA sets the first cap.");
  module.def("linear_attention", py_linear_attention);
  module.def("modulate", py_modulate);
  module.def("gate_residual", py_gate_residual);
  bind_peak(module);
}
