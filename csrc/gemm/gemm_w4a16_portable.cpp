// The product with 4-bit weights in plain C++, for any processor: a byte of nibbles becomes two "vectors" of one float.
#include "common/portable.h"

#include "common/steps.h"

namespace sana {
namespace {

inline void unpack(const uint8_t* nibbles, Vec& even, Vec& odd) {
  even = float(int8_t(*nibbles << 4) >> 4);
  odd = float(int8_t(*nibbles) >> 4);
}

}  // namespace
}  // namespace sana

#include "gemm/gemm_w4a16_vector.h"

namespace sana {

const GemmW4A16Kernels gemm_w4a16_portable = {row_bytes<FloatStep>, arrange_floats, block_of<FloatStep>};

}  // namespace sana
