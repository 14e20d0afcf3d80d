// A tile of the DC-AE's convolutions, by the algorithm and the products that its weights ask for; include
// common/avx512.h, avx2.h or portable.h first.
#pragma once

#include "conv2d/conv2d_vector.h"
#include "conv2d/winograd_vector.h"

namespace sana {
namespace {

// E: the type of x.
template <class E, class M>
void tiles_of_int8(const Conv2d& p, const Layout& l, const Tile& tiles, char* memory) {
  if (!p.transformed) return tiles_of<E, M>(p, l, tiles, memory);
  winograd_tile<Winograd2, E, M, TileValues>(p, tiles, memory);
}

template <class E, class M>
void tiles_of_int16(const Conv2d& p, const Tile& tiles, char* memory) {
  if (p.phases == 4) return winograd_tile<Upsampling, E, M, PatchValues>(p, tiles, memory);
  winograd_tile<Winograd4, E, M, PatchValues>(p, tiles, memory);
}

// `Multiply` of an instruction set: for pairs of bf16 and for int8, and with floats and int16.
template <template <class> class Multiply, class BFloat16, class Int8>
void tiles_narrow(const Conv2d& p, const Layout& l, const Tile& tiles, char* memory) {
  if (p.weight_scale == nullptr) return tiles_of<BF16, Multiply<BFloat16>>(p, l, tiles, memory);
  if (p.dtype == DType::f32) return tiles_of_int8<F32, Multiply<Int8>>(p, l, tiles, memory);
  tiles_of_int8<BF16, Multiply<Int8>>(p, l, tiles, memory);
}

template <template <class> class Multiply, class Float, class BFloat16, class Int8, class Int16>
void tiles_any(const Conv2d& p, const Layout& l, const Tile& tiles, char* memory) {
  const bool wide = p.dtype == DType::f32;
  if (wide && p.weight_scale == nullptr) return tiles_of<F32, Multiply<Float>>(p, l, tiles, memory);
  if (!p.transformed || p.weight_bytes == 1) return tiles_narrow<Multiply, BFloat16, Int8>(p, l, tiles, memory);
  if (wide) return tiles_of_int16<F32, Multiply<Int16>>(p, tiles, memory);
  tiles_of_int16<BF16, Multiply<Int16>>(p, tiles, memory);
}

}  // namespace
}  // namespace sana
