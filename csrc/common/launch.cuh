// How every kernel is launched, and how it gets shared memory whose size is known only at launch.
//
// No source writes <<<...>>> or extern __shared__ itself: these functions have a second implementation in csrc/emulator, which runs the same kernels on the host.
#pragma once

#ifdef SANA_EMULATED
#include "emulator/launch.h"
#else

#include <cuda_runtime.h>

#include <cstddef>

namespace sana {

// kernel<<<grid, block, shared, stream>>>(args...), where `shared` bytes may exceed 48 KB (up to 99 KB on every
// target). Returns what is wrong with the launch; a fault inside the kernel shows up at a later CUDA call.
template <auto kernel, class... Args>
cudaError_t launch_kernel(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const Args&... args) {
  if (shared > 48 * 1024) {
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, limit, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared, stream>>>(args...);
  return cudaGetLastError();
}

// Whether the current GPU has the kernel's code, and its driver takes it.
template <auto kernel>
cudaError_t load_kernel() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char sana_dynamic_shared[];
  return reinterpret_cast<T*>(sana_dynamic_shared);
}

}  // namespace sana

#endif
