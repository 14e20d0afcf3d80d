// Adaptive layer norm and gated residual for AVX2.
#include "common/avx2.h"

#include "modulate/modulate_vector.h"

namespace sana {

const ModulateKernels modulate_avx2 = {modulate_any, gate_residual_any};

}  // namespace sana
