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
  if (p.kernel == kWinograd) return winograd_tile<E, M, TileScales<E>>(p, winograd_layout(p), tiles, memory);
  tiles_of<E, M>(p, l, tiles, memory);
}

// `Multiply` of an instruction set: for pairs of bf16 and for int8, and with floats.
template <template <class> class Multiply, class BFloat16, class Int8>
void tiles_narrow(const Conv2d& p, const Layout& l, const Tile& tiles, char* memory) {
  if (p.weight_scale == nullptr) return tiles_of<BF16, Multiply<BFloat16>>(p, l, tiles, memory);
  if (p.dtype == DType::f32) return tiles_of_int8<F32, Multiply<Int8>>(p, l, tiles, memory);
  tiles_of_int8<BF16, Multiply<Int8>>(p, l, tiles, memory);
}

template <template <class> class Multiply, class Float, class BFloat16, class Int8, class Int16>
void tiles_any(const Conv2d& p, const Layout& l, const Tile& tiles, char* memory) {
  const bool wide = p.dtype == DType::f32, floats = wide && p.weight_scale == nullptr;
  if (floats) return tiles_of<F32, Multiply<Float>>(p, l, tiles, memory);
  if (is_int16(p) && wide) return winograd_tile<F32, Multiply<Int16>, PatchScales<F32>>(p, winograd_layout(p), tiles, memory);
  if (is_int16(p)) return winograd_tile<BF16, Multiply<Int16>, PatchScales<BF16>>(p, winograd_layout(p), tiles, memory);
  tiles_narrow<Multiply, BFloat16, Int8>(p, l, tiles, memory);
}

}  // namespace
}  // namespace sana
