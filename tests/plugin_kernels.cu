// Launches of the plugin's kernels for tests/test_tensorrt_plugin.py: grid, block and shared memory as TensorRT would be told,
// then inputs, integers and output. Each returns a cudaError_t.
#include "linear_attention/linear_attention_plugin.cu"

extern "C" {

cudaError_t launch_sum(int x, int y, int block, int shared, const float* states, int chunks, float* state) {
  return launch_kernel<sana_linear_attention_sum>(dim3(x, y), dim3(block), shared, nullptr, states, chunks, state);
}

#define SANA_LAUNCHES(dtype, T)                                                                                       \
  cudaError_t launch_state_##dtype(int x, int y, int block, int shared, const T* k, const T* v, int N, int H,         \
                                   int chunk, float* states) {                                                       \
    return launch_kernel<sana_linear_attention_state_##dtype>(dim3(x, y), dim3(block), shared, nullptr, k, v, N, H,   \
                                                              chunk, states);                                        \
  }                                                                                                                   \
  cudaError_t launch_apply_##dtype(int x, int y, int block, int shared, const T* q, const float* state, int N, int H, \
                                   int eps, T* out) {                                                                \
    return launch_kernel<sana_linear_attention_apply_##dtype>(dim3(x, y), dim3(block), shared, nullptr, q, state, N,  \
                                                              H, eps, out);                                          \
  }

SANA_LAUNCHES(bf16, Bf16)
SANA_LAUNCHES(fp16, __half)
SANA_LAUNCHES(fp32, float)

}  // extern "C"
