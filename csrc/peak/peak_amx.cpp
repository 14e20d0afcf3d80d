// Peaks of the matrix unit (AMX): 2 × 2 tiles, each 16 rows of 64 bytes, four independent accumulators.
//
// The caller has checked cpuid and asked the kernel for the tile state (see common/cpu_features.h); the first tile
// instruction of a process without that permission ends it with SIGILL.
#include "common/tiles.h"
#include "peak/peak.h"

namespace {

// Tiles 0–3 are zeroed accumulators, 4–5 hold A and 6–7 hold B.
inline __attribute__((always_inline)) void load_tiles(const void* operands) {
  sana::configure_tiles();
  const char* data = static_cast<const char*>(operands);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, data, 64);
  _tile_loadd(5, data + 1024, 64);
  _tile_loadd(6, data + 2048, 64);
  _tile_loadd(7, data + 3072, 64);
}

}  // namespace

double peak_bf16_amx(const void* operands, int iterations) {
  load_tiles(operands);
  for (int i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return iterations * (4.0 * 16 * 16 * 32 * 2);
}

double peak_int8_amx(const void* operands, int iterations) {
  load_tiles(operands);
  for (int i = 0; i < iterations; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 5, 6);
    _tile_dpbssd(2, 4, 7);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return iterations * (4.0 * 16 * 16 * 64 * 2);
}
