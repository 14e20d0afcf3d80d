// Adaptive layer norm and gated residual for AVX-512.
#include "common/avx512.h"

#include "modulate/modulate_vector.h"

namespace sana {

const ModulateKernels SANA_AVX512_NAME(modulate) = {modulate_any, gate_residual_any};

}  // namespace sana
