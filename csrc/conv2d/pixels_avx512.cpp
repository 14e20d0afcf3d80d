// rms_norm and multi_scale for AVX-512.
#include "common/avx512.h"
#include "conv2d/pixels_vector.h"

namespace sana {

const PixelKernels SANA_AVX512_NAME(pixels) = {rms_norm_any, multi_scale_row};

}  // namespace sana
