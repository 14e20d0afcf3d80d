// The DC-AE's convolutions for AVX2.
#include "conv2d/conv2d_avx2.h"

namespace sana {

const Conv2dKernels conv2d_avx2 = {kScratch, BFloat16::kTimes, 1, 1 << 18, tiles};

}  // namespace sana
