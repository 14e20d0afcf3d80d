// What one instruction set contributes to the product with 4-bit weights; gemm_w4a16.cpp splits the work.
#pragma once

#include "gemm/gemm_cpu.h"
#include "gemm/gemm_w4a16.h"

namespace sana {

constexpr int64_t kW4A16Columns = 64;  // at most, of a block

struct GemmW4A16Kernels {
  int64_t (*row_bytes)(const GemmW4A16& p);  // of a row of x as `block` reads it, and of a column of unpacked weights
  void (*arrange)(const GemmW4A16& p, int64_t row, void* to);
  // A block of the result from arranged rows, of which `x` is the first. `panel`: room for 4 unpacked columns;
  // `sums`: for kW4A16Columns floats per row.
  void (*block)(const GemmW4A16& p, const Block& block, const char* x, char* panel, float* sums);
};

extern const GemmW4A16Kernels gemm_w4a16_portable;
extern const GemmW4A16Kernels gemm_w4a16_avx2;
extern const GemmW4A16Kernels gemm_w4a16_avx512vnni;
extern const GemmW4A16Kernels gemm_w4a16_avx512;

inline int64_t padded_k(const GemmW4A16& p) { return p.groups * p.group; }

}  // namespace sana
