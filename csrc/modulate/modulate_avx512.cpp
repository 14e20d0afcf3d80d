// Adaptive layer norm and gated residual for AVX-512.
#include "common/avx512.h"

#include "modulate/modulate_vector.h"

namespace sana {

const ModulateKernels modulate_avx512 = {modulate_any, gate_residual_any};

}  // namespace sana
