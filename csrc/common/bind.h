// From Python's arguments to the kernels' interfaces, for both modules: tensors come as addresses, kernels run without
// the GIL, a status that is not ok becomes an exception. Shapes, dtypes and strides were checked in Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/dtype.h"
#include "common/status.h"

namespace sana {

namespace py = pybind11;

using Address = uintptr_t;
using Optional = std::optional<Address>;               // None is null
using Typed = std::optional<std::pair<Address, int>>;  // address and dtype, or None

template <class T = void>
T* pointer(Optional address) {
  return address ? reinterpret_cast<T*>(*address) : nullptr;
}

// Why a call failed. Each module defines it, because only one of them knows CUDA's errors.
std::string failure(Status status);

// Calls a kernel's entry point, and raises RuntimeError where it fails.
template <class... Args>
void call(const char* op, Status (*entry)(Args...), const std::common_type_t<Args>&... args) {
  Status status;
  {
    const py::gil_scoped_release release;
    status = entry(args...);
  }
  if (status != Status::ok) throw std::runtime_error(std::string(op) + ": " + failure(status));
}

}  // namespace sana
