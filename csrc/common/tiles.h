// AMX tile registers: eight of 16 rows of 64 bytes. Which tile an instruction means is part of the instruction, so tile
// numbers are literals.
//
// With SANA_EMULATE_TILES the same names are functions over ordinary memory (csrc/emulator/tiles.h), so that kernels
// for AMX can be tested on any machine with AVX-512.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#if defined(SANA_EMULATE_TILES)
#include "emulator/tiles.h"
#endif

namespace sana {
namespace {

struct alignas(64) TileConfig {  // the memory operand of ldtilecfg
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

// All eight tiles, whole. The caller has made sure that the process may use them (common/cpu_features.h).
inline void configure_tiles() {
  const TileConfig config;
  // gcc 12 declares that ldtilecfg reads 8 bytes, and drops the stores to the other 56 unless something else may read
  // them.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace sana
