// Adaptive layer norm and gated residual on NVIDIA GPUs: the C++ interface.
#pragma once

#include "common/rows_cuda.h"
#include "modulate/modulate.h"

namespace sana {

// Writes p.out; or, where quantized.values is not null, 8-bit rows instead. `stream`: a cudaStream_t.
Status modulate_cuda(const Modulate& p, const QuantizedRows& quantized, void* stream);
Status gate_residual_cuda(const GateResidual& p, void* stream);

}  // namespace sana
