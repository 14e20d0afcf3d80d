// The main loop that all matrix products on tensor cores share: a block's tile of x weight^T, K in slabs of 64 bytes.
//
// mma.sync takes 32 bytes of K per instruction whatever the type: 16 values of 16 bits, 32 of 8 or 64 of 4, in
// registers that ldmatrix fills in the same way (common/ptx.cuh). So this loop knows bytes only; what an instruction
// does with them is the caller's.
//
// Shared memory holds `Stages` slabs of both operands. While warps multiply one slab, cp.async brings the next ones;
// one barrier per slab says both that it has landed for all threads and that nobody reads the one to be overwritten. A
// row's four pieces of 16 bytes lie in an order that depends on the row, so that the eight rows of an ldmatrix, 64
// bytes apart, meet eight different banks.
#pragma once

#include "common/cuda_common.cuh"
#include "common/ptx.cuh"

namespace sana {

constexpr int kSlab = 64;  // bytes of K

// A block's tile: WarpsM x WarpsN warps of WM x WN outputs each.
template <int WarpsM_, int WarpsN_, int WM_, int WN_, int Stages_ = 4>
struct Tile {
  static constexpr int WarpsM = WarpsM_, WarpsN = WarpsN_, WM = WM_, WN = WN_, Stages = Stages_;
  static constexpr int BM = WarpsM * WM, BN = WarpsN * WN, kThreads = 32 * WarpsM * WarpsN;
  static constexpr int MT = WM / 16, NT = WN / 8;  // mma tiles of a warp
  static constexpr int kStageBytes = (BM + BN) * kSlab;
  static_assert(WM % 16 == 0 && WN % 16 == 0, "ldmatrix loads 16 rows of either operand");
};

// Row-major rows of `bytes` bytes of K, a multiple of 16, `pitch` bytes apart; the address is a multiple of 16.
struct Operand {
  const uint8_t* data;
  int64_t pitch;
  int rows, bytes;
};

// The outputs of a warp's 16 x 8 mma tiles, in the layout of d[] in common/ptx.cuh.
template <class T, class Sum>
using Sums = Sum[T::MT][T::NT][4];

__device__ inline int swizzled(int row, int piece) { return row * kSlab + (piece ^ (row / 2 % 4)) * 16; }

// Starts to copy rows first ... first + Rows - 1, bytes at ... at + 63; zeros beyond the operand's ends.
template <int Rows, int Threads>
__device__ inline void load_slab(uint8_t* to, const Operand& from, int64_t first, int at) {
#pragma unroll 1  // unrolled, its addresses take the registers that the sums need
  for (int i = threadIdx.x; i < Rows * 4; i += Threads) {
    const int row = i / 4, piece = i % 4, byte = at + piece * 16;
    const bool inside = first + row < from.rows && byte < from.bytes;
    cp_async<16>(to + swizzled(row, piece), inside ? from.data + (first + row) * from.pitch + byte : from.data,
                 inside ? 16 : 0);
  }
}

struct WeightFragment {
  uint32_t b[2];
};

// Calls step(stage, half of the slab, i, j, fragment of x, fragment of weight) for all tiles i, j of the warp, and that
// for every 32 bytes of K in order. also_load(stage, slab) may start further copies for a slab. m, n: the block's first
// row of x and of weight. On return all copies have landed; other warps may still read `shared`.
template <class T, class AlsoLoad, class Step>
__device__ void multiply(const Operand& x, const Operand& weight, int64_t m, int64_t n, uint8_t* shared,
                         AlsoLoad also_load, Step step) {
  const int slabs = (x.bytes + kSlab - 1) / kSlab;
  const auto load = [&](int slab) {
    if (slab < slabs) {
      uint8_t* stage = shared + slab % T::Stages * T::kStageBytes;
      load_slab<T::BM, T::kThreads>(stage, x, m, slab * kSlab);
      load_slab<T::BN, T::kThreads>(stage + T::BM * kSlab, weight, n, slab * kSlab);
      also_load(slab % T::Stages, slab);
    }
    cp_async_commit();  // a group per slab, empty after the last: the wait below counts groups
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // ldmatrix's four 8 x 8 matrices are, of x, 16 rows by 32 bytes: rows first; of weight, bytes first.
  const int x_row = warp / T::WarpsN * T::WM + lane % 16, x_piece = lane / 16;
  const int w_row = warp % T::WarpsN * T::WN + lane % 8 + lane / 16 * 8, w_piece = lane / 8 % 2;

  for (int slab = 0; slab < T::Stages - 1; ++slab) load(slab);
  for (int slab = 0; slab < slabs; ++slab) {
    cp_async_wait<T::Stages - 2>();
    __syncthreads();  // this slab is there for all warps, and the one before it has been read by all
    load(slab + T::Stages - 1);
    const int stage = slab % T::Stages;
    const uint8_t* xs = shared + stage * T::kStageBytes;
    const uint8_t* ws = xs + T::BM * kSlab;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t fx[T::MT][4];
#pragma unroll
      for (int i = 0; i < T::MT; ++i) ldmatrix(fx[i], xs + swizzled(x_row + i * 16, half * 2 + x_piece));
#pragma unroll
      for (int j = 0; j < T::NT; j += 2) {
        uint32_t fw[4];
        ldmatrix(fw, ws + swizzled(w_row + j * 8, half * 2 + w_piece));
#pragma unroll
        for (int i = 0; i < T::MT; ++i) {
          step(stage, half, i, j, fx[i], {fw[0], fw[1]});
          step(stage, half, i, j + 1, fx[i], {fw[2], fw[3]});
        }
      }
    }
  }
  cp_async_wait<0>();
}

}  // namespace sana
