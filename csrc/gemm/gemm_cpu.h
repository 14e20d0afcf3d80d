// What one instruction set contributes to the matrix product: a block of the result, epilogue included. gemm.cpp splits
// the work.
#pragma once

#include "common/integers.h"
#include "gemm/gemm.h"

namespace sana {

struct Block {
  int64_t first_row, last_row;        // multiples of GemmKernels::rows, but for M
  int64_t first_column, last_column;  // multiples of GemmKernels::columns, but for N
  bool fresh = false;                 // weights that this core has most likely not read yet
  int64_t cache = 1 << 20;            // bytes of a core's second level
};

constexpr int64_t kLine = 64;  // bytes of a cache line

struct GemmKernels {
  int64_t rows, columns;  // of the register (or tile) block: what a task should be a multiple of
  int64_t eighths;        // of the second-level cache, which the weights of a block fill at most
  int64_t scratch;        // rows of x, and a line for each, that `buffer` has room for, and 4 bytes for each row of the block
  void (*block)(const Gemm& p, const Block& block, char* buffer);
};

extern const GemmKernels gemm_portable;
extern const GemmKernels gemm_avx2;
extern const GemmKernels gemm_avxvnni;
extern const GemmKernels gemm_avx512vnni;
extern const GemmKernels gemm_avx512;
extern const GemmKernels gemm_amx;

}  // namespace sana
