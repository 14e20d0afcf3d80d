// From CUDA's errors to Status, for code that does not include CUDA.
#pragma once

#include "common/status.h"

namespace sana {

// `error`: a cudaError_t. Anything but success is remembered for this thread, and cleared on CUDA's side.
Status cuda_status(int error);

// Why the last call on this thread returned Status::cuda_error, in CUDA's words.
const char* cuda_error_text();

// Why the current GPU and its driver cannot load this module's kernels, in CUDA's words; null where they can.
const char* cuda_refusal();

}  // namespace sana
