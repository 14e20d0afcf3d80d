// Peak of float32 multiply + add with the instructions that every processor of the family has (SSE2 on x86-64).
#include "peak/peak.h"

namespace {
typedef float Vec __attribute__((vector_size(16)));
}

double peak_fp32_portable(const void* operands, int iterations) {
  const Vec* data = static_cast<const Vec*>(operands);
  const Vec x[2] = {data[0], data[1]}, y[2] = {data[2], data[3]};
  Vec acc[12];
  for (int j = 0; j < 12; ++j) acc[j] = data[4 + j];
  // Multiplying the accumulator, not x by y: without a fused instruction, that product would be computed once, before
  // the loop. |x| < 1 keeps the values bounded.
  for (int i = 0; i < iterations; ++i)
    for (int j = 0; j < 12; ++j) acc[j] = acc[j] * x[j & 1] + y[(j >> 1) & 1];
  for (Vec& a : acc) asm volatile("" : : "m"(a));
  return iterations * (12.0 * 4 * 2);
}
