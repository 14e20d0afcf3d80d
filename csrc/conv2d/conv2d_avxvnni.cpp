// The DC-AE's convolutions for AVX-VNNI.
#include "conv2d/conv2d_avx2.h"

namespace sana {

const Conv2dKernels conv2d_avxvnni = {kScratch, BFloat16::kTimes, 1, 1 << 18, tiles};

}  // namespace sana
