// What one instruction set contributes to the CPU kernels: a loop over consecutive tokens of one image. modulate.cpp
// splits the work and widens the modulation to float.
#pragma once

#include "modulate/modulate.h"

namespace sana {

struct ModulateKernels {
  // `shift`, `scale`: this image's rows, C floats each; `scale` has 1 added.
  void (*modulate)(const Modulate& p, const float* shift, const float* scale, int64_t b, int64_t first, int64_t last);
  void (*gate_residual)(const GateResidual& p, const float* gate, int64_t b, int64_t first, int64_t last);
};

extern const ModulateKernels modulate_portable;
extern const ModulateKernels modulate_avx2;
extern const ModulateKernels modulate_avx512vnni;
extern const ModulateKernels modulate_avx512;

}  // namespace sana
