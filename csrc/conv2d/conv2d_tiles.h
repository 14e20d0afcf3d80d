// A tile of the DC-AE's convolutions, by the algorithm and the products that its weights ask for; include
// common/avx512.h, avx2.h or portable.h first.
#pragma once

#include "conv2d/conv2d_vector.h"
#include "conv2d/winograd_vector.h"

namespace sana {
namespace {

// `Multiply` of an instruction set: for pairs of bf16 and for int8.
template <template <class> class Multiply, class BFloat16, class Int8>
void tiles_narrow(const Conv2d& p, const Layout& l, const Tile& tiles, char* memory) {
  if (p.weight_scale == nullptr) return tiles_of<BF16, Multiply<BFloat16>>(p, l, tiles, memory);
  if (p.dtype == DType::f32) return tiles_of<F32, Multiply<Int8>>(p, l, tiles, memory);
  tiles_of<BF16, Multiply<Int8>>(p, l, tiles, memory);
}

template <class M, class Integers>
void tiles_transformed(const Conv2d& p, const Tile& tiles, char* memory) {
  if (p.dtype == DType::f32) {
    if (p.phases == 4) return winograd_tile<Upsampling, F32, M, Integers>(p, tiles, memory);
    return winograd_tile<Winograd4, F32, M, Integers>(p, tiles, memory);
  }
  if (p.phases == 4) return winograd_tile<Upsampling, BF16, M, Integers>(p, tiles, memory);
  winograd_tile<Winograd4, BF16, M, Integers>(p, tiles, memory);
}

// The same, with floats, and of transformed kernels.
template <template <class> class Multiply, class Float, class BFloat16, class Int8, class Int8Chunks, class Int16Chunks>
void tiles_any(const Conv2d& p, const Layout& l, const Tile& tiles, char* memory) {
  if (p.transformed && p.weight_bytes == 1)
    return tiles_transformed<Multiply<Int8Chunks>, LargestInt8>(p, tiles, memory);
  if (p.transformed) return tiles_transformed<Multiply<Int16Chunks>, NormInt16>(p, tiles, memory);
  if (p.dtype == DType::f32 && p.weight_scale == nullptr)
    return tiles_of<F32, Multiply<Float>>(p, l, tiles, memory);
  tiles_narrow<Multiply, BFloat16, Int8>(p, l, tiles, memory);
}

}  // namespace
}  // namespace sana
