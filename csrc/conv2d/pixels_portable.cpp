// rms_norm and multi_scale in plain C++.
#include "common/portable.h"
#include "conv2d/pixels_vector.h"

namespace sana {

const PixelKernels pixels_portable = {rms_norm_any, multi_scale_row};

}  // namespace sana
