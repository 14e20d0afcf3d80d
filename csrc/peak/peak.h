// Peaks of this CPU for the roofline: what a loop reaches that does nothing but multiply and add in registers.
//
// Every loop runs on random data (on zeros some processors clock higher and draw less) and uses enough independent
// accumulators to hide the latency of the unit. `operands` is 64-byte aligned and holds kOperandBytes of random values
// of the loop's type: float32 or bfloat16 in ±[0.5, 1), or any integers. A loop returns the operations it did, a
// multiply and an add counting as two.
#pragma once

constexpr int kOperandBytes = 8192;

using PeakLoop = double (*)(const void* operands, int iterations);

double peak_fp32_portable(const void* operands, int iterations);
double peak_fp32_avx2(const void* operands, int iterations);
double peak_fp32_avx512(const void* operands, int iterations);
double peak_bf16_avx512(const void* operands, int iterations);
double peak_int16_avx2(const void* operands, int iterations);
double peak_int16_avxvnni(const void* operands, int iterations);
double peak_int16_avx512(const void* operands, int iterations);
double peak_int8_avxvnni(const void* operands, int iterations);
double peak_int8_avx512(const void* operands, int iterations);
double peak_bf16_amx(const void* operands, int iterations);
double peak_int8_amx(const void* operands, int iterations);
