#include "common/cuda_status.h"

#include "common/launch.cuh"

namespace sana {
namespace {
thread_local cudaError_t last_error = cudaSuccess;
__global__ void nothing() {}
}  // namespace

Status cuda_status(int error) {
  if (error == cudaSuccess) return Status::ok;
  last_error = static_cast<cudaError_t>(error);
  cudaGetLastError();
  return Status::cuda_error;
}

const char* cuda_error_text() { return cudaGetErrorString(last_error); }

// A driver that is too old for the runtime, or a GPU that the module was not built for, shows here first.
const char* cuda_refusal() {
  return cuda_status(load_kernel<nothing>()) == Status::ok ? nullptr : cuda_error_text();
}

}  // namespace sana
