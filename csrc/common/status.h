// What a kernel's entry point returns. Shapes and dtypes were checked in Python; these catch what would crash.
#pragma once

namespace sana {

enum class Status { ok, bad_shape, bad_dtype, bad_head_dim, out_of_memory, cuda_error };

static inline const char* status_text(Status status) {
  switch (status) {
    case Status::ok: return "ok";
    case Status::bad_shape: return "every size must be at least 1, and fit the layout that the header asks for";
    case Status::bad_dtype: return "dtypes are float32, float16 and bfloat16";
    case Status::bad_head_dim: return "head dims are multiples of 8 up to 128";
    case Status::out_of_memory: return "out of memory";
    case Status::cuda_error: return "a CUDA call failed";
  }
  return "unknown status";
}

}  // namespace sana
