#include "common/cpu_features.h"

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sana {
namespace {

constexpr const char* kNames[kIsas] = {"portable", "avx2", "avxvnni", "avx512vnni", "avx512", "amx"};

#if defined(__x86_64__)
bool bit(uint32_t word, int index) { return word >> index & 1; }

// Register state that the operating system saves: bits 1-2 AVX, 5-7 AVX-512, 17-18 AMX tiles.
uint64_t enabled_state() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Linux hands out the tile registers only on request, once per process.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  uint32_t a, b, c, d, b7, c7, d7, a71 = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return Isa::portable;  // no xgetbv
  const bool fma = bit(c, 12), f16c = bit(c, 29);
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return Isa::portable;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  const uint64_t state = enabled_state();
  if (!(fma && f16c && bit(b7, 5) && (state & 0x6) == 0x6)) return Isa::portable;
  const bool avx512vnni = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31) && bit(c7, 11);
  if (!(avx512vnni && (state & 0xe6) == 0xe6)) return bit(a71, 4) ? Isa::avxvnni : Isa::avx2;
  if (!bit(a71, 5)) return Isa::avx512vnni;
#if defined(SANA_EMULATE_TILES)
  return Isa::amx;  // see common/tiles.h
#endif
  const bool amx = bit(d7, 22) && bit(d7, 24) && bit(d7, 25);
  if (!(amx && (state & 0x60000) == 0x60000 && request_tiles())) return Isa::avx512;
  return Isa::amx;
}

bool detect_avxvnni() {
  uint32_t a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  return bit(a, 4);
}
#else
Isa detect() { return Isa::portable; }
bool detect_avxvnni() { return false; }
#endif

Isa best() {
  static const Isa isa = detect();
  return isa;
}

// What this module was compiled for; setup.py defines the macros.
constexpr Isa kBuilt =
#if defined(SANA_HAVE_AMX)
    Isa::amx;
#elif defined(SANA_HAVE_AVX512)
    Isa::avx512;
#elif defined(SANA_HAVE_AVX512VNNI)
    Isa::avx512vnni;
#elif defined(SANA_HAVE_AVXVNNI)
    Isa::avxvnni;
#elif defined(SANA_HAVE_AVX2)
    Isa::avx2;
#else
    Isa::portable;
#endif

std::atomic<Isa> cap{kBuilt};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool cpu_has(Isa isa) {
  static const bool avxvnni = detect_avxvnni();
  return isa <= best() && (isa != Isa::avxvnni || avxvnni);
}

Isa active_isa() {
  const Isa allowed = cap.load(std::memory_order_relaxed), isa = allowed < best() ? allowed : best();
  return cpu_has(isa) ? isa : Isa::avx2;
}

bool set_isa_cap(const char* name) {
  for (int i = 0; i < kIsas; ++i) {
    if (std::strcmp(name, kNames[i])) continue;
    cap = Isa(i) < kBuilt ? Isa(i) : kBuilt;
    return true;
  }
  return false;
}

}  // namespace sana
