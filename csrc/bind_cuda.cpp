// The module sana_kernels._cuda: addresses and sizes from Python to the CUDA kernels, nothing else. What a caller may
// pass is checked in Python; a launch that CUDA refuses raises RuntimeError in CUDA's own words.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/build_info.h"
#include "common/cuda_status.h"
#include "linear_attention/bind_linear_attention.h"

namespace py = pybind11;
using namespace sana;

namespace {

void raise_unless_ok(Status status) {
  if (status == Status::cuda_error) throw std::runtime_error(std::string("CUDA: ") + cuda_error_text());
  if (status != Status::ok) throw std::invalid_argument(status_text(status));
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
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
         const std::array<std::array<int64_t, 3>, 3>& strides, int dtype, const std::array<NormWeight, 2>& norms,
         float norm_eps, float eps, Address scratch, Address stream) {
        const LinearAttention p = linear_attention_args(pointers, shape, strides, dtype, norms, norm_eps, eps);
        Status status;
        {
          const py::gil_scoped_release release;
          status = linear_attention_cuda(p, reinterpret_cast<float*>(scratch), reinterpret_cast<void*>(stream));
        }
        raise_unless_ok(status);
      },
      py::arg("pointers"), py::arg("shape"), py::arg("strides"), py::arg("dtype"), py::arg("norms"),
      py::arg("norm_eps"), py::arg("eps"), py::arg("scratch"), py::arg("stream"),
      "pointers: q, k, v, out; shape: (B, N, H, D); strides: of B, N, H for q, k, v; norms: (address, dtype) or None.");
}
