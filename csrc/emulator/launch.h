// Host version of common/launch.cuh, and the few functions of the CUDA runtime that the sources call.
#pragma once

#include "emulator/machine.h"

namespace sana {
namespace emulator {

inline cudaError_t last_error = cudaSuccess;
inline std::string last_message;

}  // namespace emulator

template <auto kernel, class... Args>
cudaError_t launch_kernel(dim3 grid, dim3 block, size_t shared, cudaStream_t, const Args&... args) {
  try {
    emulator::machine().run(grid, block, shared, [&] { kernel(args...); });
    return cudaSuccess;
  } catch (const emulator::Failure& failure) {
    const std::string name = __PRETTY_FUNCTION__;  // ... [with auto kernel = NAME; Args = ...]
    const size_t begin = name.find("kernel = ") + 9;
    emulator::last_message = name.substr(begin, name.find("; Args", begin) - begin) + ": " + failure.what();
    return emulator::last_error = cudaErrorLaunchFailure;
  }
}

template <auto kernel>
cudaError_t load_kernel() {
  return cudaSuccess;
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::machine().dynamic_shared());
}

}  // namespace sana

extern "C" {

__attribute__((weak)) cudaError_t cudaGetLastError() { return std::exchange(sana::emulator::last_error, cudaSuccess); }

__attribute__((weak)) const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : sana::emulator::last_message.c_str();
}

}  // extern "C"
