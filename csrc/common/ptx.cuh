// The PTX instructions that CUDA C++ has no name for, each as one function: asynchronous copies, matrix loads, and the
// tensor cores' matrix products. csrc/emulator/ptx.h implements the same functions for the host.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k32 / m16n8k64"): a register packs E = 2, 4 or 8
// elements along k, lowest bits first, and K = 8 * E. With g = lane / 4 and t = lane % 4, element i of
//     a[r] is A[g + 8 * (r % 2)][4 * E * (r / 2) + E * t + i]        A is 16 x K
//     b[r] is B[4 * E * r + E * t + i][g]                            B is K x 8
//     d[r] is D[g + 8 * (r / 2)][2 * t + r % 2]                      D is 16 x 8, one element per register
// so that A row-major and B column-major (weights as (out, in)) are loaded without a transpose.
// All 32 lanes of the warp take part in ldmatrix and mma.
#pragma once

#include <cstdint>

#ifdef SANA_EMULATED
#include "emulator/ptx.h"
#else

namespace sana {

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts to copy `valid` bytes (0 ... Bytes) from global to shared memory and to zero the rest of Bytes = 4, 8 or 16.
// Both addresses are multiples of Bytes; `global` is not read where `valid` is 0. 16 bytes bypass the L1 cache.
template <int Bytes>
__device__ inline void cp_async(void* shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const uint32_t to = shared_address(shared);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(Bytes), "r"(valid)
                 : "memory");
  }
}

// Closes the group of this thread's copies since the last commit.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's groups are under way. Other threads see the data after a barrier.
template <int Pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Loads 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 * m + i gives the address of row i of matrix m: 16
// bytes, the address a multiple of 16 (lanes beyond the last matrix give any address). Lane 4 * i + j receives in r[m]
// the elements 2 * j and 2 * j + 1 of row i, or with ldmatrix_trans of column i.
__device__ inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// D += A * B. Integer sums wrap around in 32 bits: of int8 products not before K = 131,072.
#define SANA_MMA(name, instruction, Accumulator, c)                                                                 \
  __device__ inline void name(Accumulator(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                 \
    asm volatile("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : c(d[0]), c(d[1]), c(d[2]), c(d[3])                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
  }
SANA_MMA(mma_m16n8k16_f16, "m16n8k16.row.col.f32.f16.f16.f32", float, "+f")
SANA_MMA(mma_m16n8k16_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", float, "+f")
SANA_MMA(mma_m16n8k32_s8, "m16n8k32.row.col.s32.s8.s8.s32", int32_t, "+r")
SANA_MMA(mma_m16n8k64_s4, "m16n8k64.row.col.s32.s4.s4.s32", int32_t, "+r")  // fast on sm_80, 86, 89 only
#undef SANA_MMA

}  // namespace sana

#endif
