#include "common/cuda_status.h"

#include <cuda_runtime.h>

namespace sana {
namespace {
thread_local cudaError_t last_error = cudaSuccess;
}

Status cuda_status(int error) {
  if (error == cudaSuccess) return Status::ok;
  last_error = static_cast<cudaError_t>(error);
  cudaGetLastError();
  return Status::cuda_error;
}

const char* cuda_error_text() { return cudaGetErrorString(last_error); }

}  // namespace sana
