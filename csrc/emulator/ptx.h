// Host version of common/ptx.cuh, which documents the functions and the fragments.
#pragma once

#include "emulator/device.h"

namespace sana {

namespace emulator {

inline void check_shared(const char* what, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    machine().fail(std::string(what) + ": unaligned shared address");
  if (!machine().in_shared(address, bytes)) machine().fail(std::string(what) + ": not an address in shared memory");
}

}  // namespace emulator

// Until its wait the target holds poison: whoever reads it too early, or still needs what was there, goes wrong.
template <int Bytes>
void cp_async(void* shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::check_shared("cp.async", shared, Bytes);
  if (reinterpret_cast<uintptr_t>(global) % Bytes != 0) emulator::machine().fail("cp.async: unaligned global address");
  if (valid < 0 || valid > Bytes) emulator::machine().fail("cp.async: more valid bytes than bytes");
  std::memset(shared, emulator::machine().poison(), Bytes);
  emulator::Thread& thread = emulator::machine().current();
  thread.copies.push_back({shared, global, valid, Bytes, thread.copy_group});
}

inline void cp_async_commit() { ++emulator::machine().current().copy_group; }

template <int Pending>
void cp_async_wait() {
  emulator::Thread& thread = emulator::machine().current();
  auto landed = [&](const emulator::Copy& copy) { return copy.group < thread.copy_group - Pending; };
  for (const emulator::Copy& copy : thread.copies) {
    if (!landed(copy)) continue;
    std::memset(copy.to, 0, copy.bytes);
    if (copy.valid > 0) std::memcpy(copy.to, copy.from, copy.valid);
  }
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), landed), thread.copies.end());
}

namespace emulator {

template <int Count, bool Transpose>
struct LoadMatrix {
  uint16_t row[8];  // read when its lane arrives: the instruction orders no memory accesses of different lanes
  uint32_t* r;

  static void combine(LoadMatrix* const* lanes, unsigned) {
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int m = 0; m < Count; ++m) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
          const int major = lane / 4, minor = lane % 4 * 2 + e;
          const int row = Transpose ? minor : major, column = Transpose ? major : minor;
          pair[e] = lanes[8 * m + row]->row[column];
        }
        lanes[lane]->r[m] = pair[0] | uint32_t{pair[1]} << 16;
      }
    }
  }
};

template <bool Transpose, int Count>
void load_matrix(uint32_t (&r)[Count], const void* row, Where where) {
  LoadMatrix<Count, Transpose> data{{}, r};
  if (lane() < 8 * Count) {
    check_shared("ldmatrix", row, 16);
    std::memcpy(data.row, row, 16);
  }
  warp_operation("ldmatrix", kFullWarp, data, where);
}

struct Half {
  using Sum = float;
  static constexpr int bits = 16;
  static double value(uint32_t x) { return __half2float(__half(__half_raw{static_cast<unsigned short>(x)})); }
};
struct Bfloat16 {
  using Sum = float;
  static constexpr int bits = 16;
  static double value(uint32_t x) {
    return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{static_cast<unsigned short>(x)}));
  }
};
template <int Bits>
struct Int {
  using Sum = int32_t;
  static constexpr int bits = Bits;
  static int64_t value(uint32_t x) { return static_cast<int32_t>(x << (32 - Bits)) >> (32 - Bits); }
};

// One mma of a warp. Floats: the exact sum of the products and D, rounded once; a GPU keeps a few bits less.
template <class Element>
struct Mma {
  using Sum = typename Element::Sum;
  static constexpr int E = 32 / Element::bits, K = 8 * E;
  Sum* d;
  const uint32_t* a;
  const uint32_t* b;

  static auto element(uint32_t packed, int i) {
    return Element::value(packed >> (i * Element::bits) & ((1u << Element::bits) - 1));
  }

  static void combine(Mma* const* lanes, unsigned) {
    decltype(element(0, 0)) A[16][K], B[K][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < E; ++i) {
        for (int r = 0; r < 4; ++r) A[g + 8 * (r % 2)][4 * E * (r / 2) + E * t + i] = element(lanes[lane]->a[r], i);
        for (int r = 0; r < 2; ++r) B[4 * E * r + E * t + i][g] = element(lanes[lane]->b[r], i);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        auto sum = static_cast<decltype(element(0, 0))>(lanes[lane]->d[r]);
        for (int k = 0; k < K; ++k) sum += A[g + 8 * (r / 2)][k] * B[k][2 * t + r % 2];
        lanes[lane]->d[r] = static_cast<Sum>(sum);
      }
    }
  }
};

template <class Element>
void mma(typename Element::Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  Mma<Element> data{d, a, b};
  warp_operation("mma", kFullWarp, data, where);
}

}  // namespace emulator

template <int Count>
void ldmatrix(uint32_t (&r)[Count], const void* row, emulator::Where where = emulator::Where::here()) {
  emulator::load_matrix<false>(r, row, where);
}
template <int Count>
void ldmatrix_trans(uint32_t (&r)[Count], const void* row, emulator::Where where = emulator::Where::here()) {
  emulator::load_matrix<true>(r, row, where);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             emulator::Where where = emulator::Where::here()) {
  emulator::mma<emulator::Half>(d, a, b, where);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              emulator::Where where = emulator::Where::here()) {
  emulator::mma<emulator::Bfloat16>(d, a, b, where);
}
inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            emulator::Where where = emulator::Where::here()) {
  emulator::mma<emulator::Int<8>>(d, a, b, where);
}
inline void mma_m16n8k64_s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            emulator::Where where = emulator::Where::here()) {
  emulator::mma<emulator::Int<4>>(d, a, b, where);
}

}  // namespace sana
