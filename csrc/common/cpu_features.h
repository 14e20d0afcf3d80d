// Which instruction set the kernels use: the best one that the processor, the operating system, the compiler that built
// this module and the cap (SANA_KERNELS_ISA, or set_isa_cap) allow.
#pragma once

namespace sana {

// In order: each tier includes those before it, but for avxvnni, which some processors with AVX-512 lack. avx2 stands for
// AVX2 + FMA + F16C; avxvnni for that and dot products of 256 bits, of int8 and int16; avx512vnni for F, BW, DQ, VL and
// VNNI, avx512 for these and BF16; amx for tiles of int8 and bf16.
enum class Isa : int { portable, avx2, avxvnni, avx512vnni, avx512, amx };
constexpr int kIsas = 6;

const char* isa_name(Isa isa);
bool cpu_has(Isa isa);  // the processor has the tier and the operating system lets us use it
Isa active_isa();
bool set_isa_cap(const char* name);  // false: the name is not known; nothing changed

// An op's table of kernels has a slot per tier, in the order of Isa: {&op_portable, SANA_AVX2(&op_avx2), nullptr,
// SANA_AVX512VNNI(&op_avx512vnni), SANA_AVX512(&op_avx512), nullptr}; op_avx512.cpp makes both of AVX-512. A slot is
// empty where the op has no kernel for the tier, or, through these macros, where the compiler could not target it.
#if defined(SANA_HAVE_AVX2)
#define SANA_AVX2(kernels) kernels
#else
#define SANA_AVX2(kernels) nullptr
#endif
#if defined(SANA_HAVE_AVXVNNI)
#define SANA_AVXVNNI(kernels) kernels
#else
#define SANA_AVXVNNI(kernels) nullptr
#endif
#if defined(SANA_HAVE_AVX512VNNI)
#define SANA_AVX512VNNI(kernels) kernels
#else
#define SANA_AVX512VNNI(kernels) nullptr
#endif
#if defined(SANA_HAVE_AVX512)
#define SANA_AVX512(kernels) kernels
#else
#define SANA_AVX512(kernels) nullptr
#endif
#if defined(SANA_HAVE_AMX)
#define SANA_AMX(kernels) kernels
#else
#define SANA_AMX(kernels) nullptr
#endif

// The entry for the active tier, or the best below it whose slot is filled; the portable slot always is.
template <class Kernels>
const Kernels& choose(const Kernels* const (&by_isa)[kIsas]) {
  int isa = static_cast<int>(active_isa());
  while (by_isa[isa] == nullptr || !cpu_has(Isa(isa))) --isa;
  return *by_isa[isa];
}

}  // namespace sana
