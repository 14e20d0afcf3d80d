// AMX tile instructions over ordinary memory, for tests: which bytes each of them reads and writes, and a stop where a
// kernel would have read what was never written. Sums of bf16 products are added one by one in float; the processor adds
// them in another order and takes subnormal numbers for zero.
//
// Defined only where SANA_EMULATE_TILES asks for it, in place of the compiler's macros of the same names.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace sana {
namespace emulated_tiles {

struct State {
  bool configured = false;
  uint8_t rows[8] = {};
  uint16_t bytes_per_row[8] = {};
  bool written[8] = {};
  alignas(64) unsigned char data[8][16][64];
};

inline State& state() {
  static thread_local State tiles;
  return tiles;
}

inline void require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "tile emulator: %s\n", what);
  abort();
}

inline void use(int tile) {
  require(state().configured, "a tile is used before ldtilecfg");
  require(tile >= 0 && tile < 8, "there are tiles 0 to 7");
}

inline void read(int tile) {
  use(tile);
  require(state().written[tile], "a tile is read that was never written");
}

inline void load_config(const void* memory) {
  const unsigned char* bytes = static_cast<const unsigned char*>(memory);
  State& tiles = state();
  require(bytes[0] == 1, "palette 1 is the only one");
  for (int i = 1; i < 16; ++i) require(bytes[i] == 0, "reserved bytes of the configuration are zero");
  for (int i = 0; i < 8; ++i)
    require(bytes[56 + i] == 0 && bytes[32 + 2 * i] == 0 && bytes[33 + 2 * i] == 0, "there are only eight tiles");
  for (int t = 0; t < 8; ++t) {
    memcpy(&tiles.bytes_per_row[t], bytes + 16 + 2 * t, 2);
    tiles.rows[t] = bytes[48 + t];
    require(tiles.rows[t] <= 16 && tiles.bytes_per_row[t] <= 64, "a tile has at most 16 rows of 64 bytes");
    tiles.written[t] = false;
    memset(tiles.data[t], 0xcd, sizeof tiles.data[t]);
  }
  tiles.configured = true;
}

inline void release() { state().configured = false; }

inline void load(int tile, const void* base, int64_t stride) {
  use(tile);
  State& tiles = state();
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int r = 0; r < tiles.rows[tile]; ++r)
    memcpy(tiles.data[tile][r], static_cast<const char*>(base) + r * stride, tiles.bytes_per_row[tile]);
  tiles.written[tile] = true;
}

inline void store(int tile, void* base, int64_t stride) {
  read(tile);
  const State& tiles = state();
  for (int r = 0; r < tiles.rows[tile]; ++r)
    memcpy(static_cast<char*>(base) + r * stride, tiles.data[tile][r], tiles.bytes_per_row[tile]);
}

inline void zero(int tile) {
  use(tile);
  memset(state().data[tile], 0, sizeof state().data[tile]);
  state().written[tile] = true;
}

// f(sum, a, b) for every row m of a, group k of 4 bytes of that row, and column n of the sums.
template <class Sum, class F>
void multiply(int sum, int a, int b, F f) {
  read(sum), read(a), read(b);
  State& tiles = state();
  require(tiles.rows[sum] == tiles.rows[a] && tiles.bytes_per_row[sum] == tiles.bytes_per_row[b] &&
              tiles.bytes_per_row[a] == 4 * tiles.rows[b] && sum != a && sum != b && a != b,
          "the tiles of a product do not fit each other");
  for (int m = 0; m < tiles.rows[sum]; ++m)
    for (int k = 0; k < tiles.bytes_per_row[a] / 4; ++k)
      for (int n = 0; n < tiles.bytes_per_row[sum] / 4; ++n) {
        Sum value;
        memcpy(&value, &tiles.data[sum][m][4 * n], 4);
        value = f(value, &tiles.data[a][m][4 * k], &tiles.data[b][k][4 * n]);
        memcpy(&tiles.data[sum][m][4 * n], &value, 4);
      }
}

inline void dpbssd(int sum, int a, int b) {
  multiply<int32_t>(sum, a, b, [](int32_t value, const unsigned char* x, const unsigned char* y) {
    for (int i = 0; i < 4; ++i) value += int32_t(int8_t(x[i])) * int8_t(y[i]);
    return value;
  });
}

inline float bf16(const unsigned char* x) {
  const uint32_t bits = uint32_t(x[0]) << 16 | uint32_t(x[1]) << 24;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline void dpbf16ps(int sum, int a, int b) {
  multiply<float>(sum, a, b, [](float value, const unsigned char* x, const unsigned char* y) {
    for (int i = 0; i < 2; ++i) value += bf16(x + 2 * i) * bf16(y + 2 * i);
    return value;
  });
}

}  // namespace emulated_tiles
}  // namespace sana

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig ::sana::emulated_tiles::load_config
#define _tile_release ::sana::emulated_tiles::release
#define _tile_loadd ::sana::emulated_tiles::load
#define _tile_stream_loadd ::sana::emulated_tiles::load
#define _tile_stored ::sana::emulated_tiles::store
#define _tile_zero ::sana::emulated_tiles::zero
#define _tile_dpbssd ::sana::emulated_tiles::dpbssd
#define _tile_dpbf16ps ::sana::emulated_tiles::dpbf16ps
