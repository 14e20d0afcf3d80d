// rms_norm and multi_scale for AVX2.
#include "common/avx2.h"
#include "conv2d/pixels_vector.h"

namespace sana {

const PixelKernels pixels_avx2 = {rms_norm_any, multi_scale_row};

}  // namespace sana
