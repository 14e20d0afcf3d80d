// The module sana_kernels._cuda: addresses and sizes from Python to the CUDA kernels, nothing else. What a caller may
// pass is checked in Python; a launch that CUDA refuses raises RuntimeError in CUDA's own words.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/build_info.h"
#include "common/cuda_status.h"
#include "linear_attention/linear_attention.h"

namespace py = pybind11;
using namespace sana;

namespace {

using Weight = std::optional<std::pair<uintptr_t, int>>;  // address and dtype, or None

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void raise_unless_ok(Status status) {
  if (status == Status::cuda_error) throw std::runtime_error(std::string("CUDA: ") + cuda_error_text());
  if (status != Status::ok) throw std::invalid_argument(status_text(status));
}

LinearAttention linear_attention_args(const std::array<uintptr_t, 4>& pointers, const std::array<int64_t, 4>& shape,
                                      const std::array<std::array<int64_t, 3>, 3>& strides, int dtype,
                                      const std::array<Weight, 2>& norms, float norm_eps, float eps) {
  LinearAttention p = {};
  p.q = pointer(pointers[0]);
  p.k = pointer(pointers[1]);
  p.v = pointer(pointers[2]);
  p.out = pointer(pointers[3]);
  p.B = shape[0];
  p.N = shape[1];
  p.H = shape[2];
  p.D = shape[3];
  for (int i = 0; i < 3; ++i) {
    p.q_stride[i] = strides[0][i];
    p.k_stride[i] = strides[1][i];
    p.v_stride[i] = strides[2][i];
  }
  p.dtype = static_cast<DType>(dtype);
  if (norms[0]) p.q_norm = pointer(norms[0]->first), p.q_norm_dtype = static_cast<DType>(norms[0]->second);
  if (norms[1]) p.k_norm = pointer(norms[1]->first), p.k_norm_dtype = static_cast<DType>(norms[1]->second);
  p.norm_eps = norm_eps;
  p.eps = eps;
  return p;
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
      [](const std::array<uintptr_t, 4>& pointers, const std::array<int64_t, 4>& shape,
         const std::array<std::array<int64_t, 3>, 3>& strides, int dtype, const std::array<Weight, 2>& norms,
         float norm_eps, float eps, uintptr_t scratch, uintptr_t stream) {
        const LinearAttention p = linear_attention_args(pointers, shape, strides, dtype, norms, norm_eps, eps);
        Status status;
        {
          const py::gil_scoped_release release;
          status = linear_attention_cuda(p, pointer<float>(scratch), pointer(stream));
        }
        raise_unless_ok(status);
      },
      py::arg("pointers"), py::arg("shape"), py::arg("strides"), py::arg("dtype"), py::arg("norms"),
      py::arg("norm_eps"), py::arg("eps"), py::arg("scratch"), py::arg("stream"),
      "pointers: q, k, v, out; shape: (B, N, H, D); strides: of B, N, H for q, k, v; norms: (address, dtype) or None.");
}
