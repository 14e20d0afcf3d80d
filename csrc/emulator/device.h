// The names that CUDA C++ gives a kernel, for the host: __shared__, barriers, warp operations, atomics, intrinsics.
// What is missing here and not in CUDA's own headers does not compile; add it with a test in tests/test_emulator.py.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "emulator/machine.h"

// On one operating-system thread a block's shared variables are its thread_local ones, which lie side by side in memory
// that the machine can find and poison.
#undef __shared__
#define __shared__ static thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace sana {
namespace emulator {

// All lanes of `mask` bring a Data; Data::combine fills in everybody's results.
template <class Data>
void warp_operation(const char* what, unsigned mask, Data& data, Where where) {
  auto combine = [](void* const* lanes, unsigned m) { Data::combine(reinterpret_cast<Data* const*>(lanes), m); };
  machine().wait({what, where, mask, &data, combine});
}

template <class T>
struct Shuffle {
  T value, result;
  int source;

  static void combine(Shuffle* const* lanes, unsigned mask) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      const int source = lanes[lane]->source;
      if ((mask >> source & 1) == 0) throw Failure("a shuffle reads from a lane that its mask leaves out");
      lanes[lane]->result = lanes[source]->value;
    }
  }
};

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, Where where) {
  Shuffle<T> data{value, value, source};
  warp_operation(what, mask, data, where);
  return data.result;
}

inline int lane() { return machine().current().lane; }

template <class T, T (*Join)(T, T)>
struct Reduce {
  T value, result;

  static void combine(Reduce* const* lanes, unsigned mask) {
    bool first = true;
    T total{};
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      total = first ? lanes[lane]->value : Join(total, lanes[lane]->value);
      first = false;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1) lanes[lane]->result = total;
    }
  }
};

template <class T, T (*Join)(T, T)>
T reduce(const char* what, unsigned mask, T value, Where where) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "__reduce_*_sync takes int or unsigned");
  Reduce<T, Join> data{value, value};
  warp_operation(what, mask, data, where);
  return data.result;
}

template <class T>
T join_add(T a, T b) {
  return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
}
template <class T>
T join_min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T join_max(T a, T b) {
  return a < b ? b : a;
}
inline unsigned join_or(unsigned a, unsigned b) { return a | b; }

template <class T>
constexpr void check_atomic() {
  static_assert(std::is_integral_v<T>,
                "no atomics on floats: their sum depends on who comes first, and the same seed has "
                "to give the same picture. Write partial sums and add them in a fixed order");
}

}  // namespace emulator
}  // namespace sana

// ---- Barriers

inline void __syncthreads(sana::emulator::Where where = sana::emulator::Where::here()) {
  sana::emulator::machine().wait({"__syncthreads", where, 0, nullptr, nullptr});
}
inline void __syncwarp(unsigned mask = sana::emulator::kFullWarp,
                       sana::emulator::Where where = sana::emulator::Where::here()) {
  sana::emulator::machine().wait({"__syncwarp", where, mask, nullptr, nullptr});
}
inline void __threadfence() {}  // blocks run one after the other

// ---- Warp operations

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              sana::emulator::Where where = sana::emulator::Where::here()) {
  const int begin = sana::emulator::lane() / width * width;
  return sana::emulator::shuffle("__shfl_sync", mask, value, begin + (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  sana::emulator::Where where = sana::emulator::Where::here()) {
  const int lane = sana::emulator::lane(), source = lane ^ bits, end = lane / width * width + width;
  return sana::emulator::shuffle("__shfl_xor_sync", mask, value, source < end ? source : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 sana::emulator::Where where = sana::emulator::Where::here()) {
  const int lane = sana::emulator::lane(), source = lane - static_cast<int>(delta);
  return sana::emulator::shuffle("__shfl_up_sync", mask, value, source >= lane / width * width ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   sana::emulator::Where where = sana::emulator::Where::here()) {
  const int lane = sana::emulator::lane(), source = lane + static_cast<int>(delta);
  const int end = lane / width * width + width;
  return sana::emulator::shuffle("__shfl_down_sync", mask, value, source < end ? source : lane, where);
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, sana::emulator::Where where = sana::emulator::Where::here()) {
  return sana::emulator::reduce<T, sana::emulator::join_add<T>>("__reduce_add_sync", mask, value, where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, sana::emulator::Where where = sana::emulator::Where::here()) {
  return sana::emulator::reduce<T, sana::emulator::join_min<T>>("__reduce_min_sync", mask, value, where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, sana::emulator::Where where = sana::emulator::Where::here()) {
  return sana::emulator::reduce<T, sana::emulator::join_max<T>>("__reduce_max_sync", mask, value, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              sana::emulator::Where where = sana::emulator::Where::here()) {
  const unsigned bit = predicate != 0 ? 1u << sana::emulator::lane() : 0;
  return sana::emulator::reduce<unsigned, sana::emulator::join_or>("__ballot_sync", mask, bit, where);
}

// ---- Atomics, on integers only

template <class T>
T atomicAdd(T* address, T value) {
  sana::emulator::check_atomic<T>();
  return std::exchange(*address, sana::emulator::join_add(*address, value));
}
template <class T>
T atomicMin(T* address, T value) {
  sana::emulator::check_atomic<T>();
  return std::exchange(*address, sana::emulator::join_min(*address, value));
}
template <class T>
T atomicMax(T* address, T value) {
  sana::emulator::check_atomic<T>();
  return std::exchange(*address, sana::emulator::join_max(*address, value));
}
template <class T>
T atomicExch(T* address, T value) {
  sana::emulator::check_atomic<T>();
  return std::exchange(*address, value);
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  sana::emulator::check_atomic<T>();
  return std::exchange(*address, *address == expected ? value : *address);
}

// ---- Memory and arithmetic

template <class T>
T __ldg(const T* address) {
  return *address;
}

namespace sana {
namespace emulator {
// As in CUDA, two integers have to be of one size.
template <class A, class B>
using CommonArithmetic =
    std::enable_if_t<(std::is_floating_point_v<A> && std::is_floating_point_v<B>) ||
                         (std::is_integral_v<A> && std::is_integral_v<B> && sizeof(A) == sizeof(B)),
                     std::common_type_t<A, B>>;
}  // namespace emulator
}  // namespace sana

template <class A, class B, class T = sana::emulator::CommonArithmetic<A, B>>
T min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));  // a number wins over NaN
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B, class T = sana::emulator::CommonArithmetic<A, B>>
T max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __float2int_rn(float x) {  // ties to even; saturates; NaN gives 0
  if (!(x == x)) return 0;
  if (x >= 2147483648.0f) return 2147483647;
  return x < -2147483648.0f ? -2147483647 - 1 : static_cast<int>(std::nearbyint(x));
}

namespace sana {
namespace emulator {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emulator
}  // namespace sana
inline float __int_as_float(int x) { return sana::emulator::bit_cast<float>(x); }
inline int __float_as_int(float x) { return sana::emulator::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return sana::emulator::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return sana::emulator::bit_cast<unsigned>(x); }

// Byte i of the result is the byte of (b, a) that bits 4i ... 4i+2 of `selector` name; with bit 4i+3 its sign, 8 times.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned select = selector >> (4 * i);
    const unsigned byte = bytes >> (select % 8 * 8) & 0xff;
    result |= ((select & 8) == 0 ? byte : (byte & 0x80) != 0 ? 0xffu : 0u) << (8 * i);
  }
  return result;
}
