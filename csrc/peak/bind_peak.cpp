// Python: `_cpu.peak_kinds()` and `_cpu.peak(kind, threads, seconds)`. The loops are in peak_<isa>.cpp; this file feeds
// them random operands, runs them on pinned threads and adds up the rates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "common/cpu_features.h"
#include "peak/peak.h"

namespace py = pybind11;
using sana::active_isa;
using sana::cpu_has;
using sana::Isa;

namespace {

using Clock = std::chrono::steady_clock;

enum class Element { fp32, bf16, integer };

struct Kind {
  const char* name;
  Isa isa;
  Element element;
  PeakLoop loop;   // null: this compiler could not target it
  int iterations;  // of one call: a fraction of a millisecond, so that the clock is read often enough and costs nothing
};

// What this processor can run, slowest instruction set first.
std::vector<Kind> kinds() {
  const Kind all[] = {
      {"fp32_portable", Isa::portable, Element::fp32, peak_fp32_portable, 1 << 13},
      {"fp32_avx2", Isa::avx2, Element::fp32, SANA_AVX2(peak_fp32_avx2), 1 << 14},
      {"int16_avx2", Isa::avx2, Element::integer, SANA_AVX2(peak_int16_avx2), 1 << 14},
      {"int16_avxvnni", Isa::avxvnni, Element::integer, SANA_AVXVNNI(peak_int16_avxvnni), 1 << 14},
      {"int8_avxvnni", Isa::avxvnni, Element::integer, SANA_AVXVNNI(peak_int8_avxvnni), 1 << 14},
      {"fp32_avx512", Isa::avx512vnni, Element::fp32, SANA_AVX512VNNI(peak_fp32_avx512), 1 << 14},
      {"bf16_avx512", Isa::avx512, Element::bf16, SANA_AVX512(peak_bf16_avx512), 1 << 14},
      {"int16_avx512", Isa::avx512vnni, Element::integer, SANA_AVX512VNNI(peak_int16_avx512), 1 << 14},
      {"int8_avx512", Isa::avx512vnni, Element::integer, SANA_AVX512VNNI(peak_int8_avx512), 1 << 14},
      {"bf16_amx", Isa::amx, Element::bf16, SANA_AMX(peak_bf16_amx), 1 << 12},
      {"int8_amx", Isa::amx, Element::integer, SANA_AMX(peak_int8_amx), 1 << 12},
  };
  std::vector<Kind> found;
  for (const Kind& kind : all)
    if (kind.loop != nullptr && cpu_has(kind.isa)) found.push_back(kind);
  return found;
}

// Threads that the roofline speaks of do not move: thread i stays on the i-th processor this process may use.
void pin(int i) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  i %= CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && i-- == 0) {
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      pthread_setaffinity_np(pthread_self(), sizeof one, &one);
      return;
    }
  }
#else
  (void)i;
#endif
}

// What all threads together did per second.
struct Rate {
  double over_all = 0;  // what others took of the processor meanwhile included
  double of_steps = 0;  // of each thread's median step: what others take is in few of them
};

// Runs `prepare(i)` and then `step(i)` over and over on `threads` threads, all of them from one moment on, and adds up
// the threads' rates: what their steps returned, per second.
template <class Prepare, class Step>
Rate total_rate(int threads, double seconds, Prepare prepare, Step step) {
  std::atomic<int> ready{0};
  std::vector<Rate> rates(threads);
  std::vector<std::thread> team;
  for (int i = 0; i < threads; ++i) {
    team.emplace_back([&, i] {
      pin(i);
      prepare(i);
      step(i);  // the first touch of memory, and the wide units' slow start
      ready.fetch_add(1);
      while (ready.load() < threads) std::this_thread::yield();
      std::vector<double> of_steps;
      const auto start = Clock::now();
      double done = 0, elapsed = 0;
      while (elapsed < seconds) {
        const double amount = step(i), before = elapsed;
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
        of_steps.push_back(amount / (elapsed - before));
        done += amount;
      }
      const auto middle = of_steps.begin() + of_steps.size() / 2;
      std::nth_element(of_steps.begin(), middle, of_steps.end());
      rates[i] = {done / elapsed, *middle};
    });
  }
  for (std::thread& thread : team) thread.join();
  Rate sum;
  for (const Rate& rate : rates) {
    sum.over_all += rate.over_all;
    sum.of_steps += rate.of_steps;
  }
  return sum;
}

struct alignas(64) Operands {
  unsigned char bytes[kOperandBytes];
};

Operands random_operands(Element element, int seed) {
  std::mt19937 random(seed);
  Operands operands;
  for (size_t at = 0; at < sizeof operands.bytes; at += 4) {
    uint32_t word = random();
    // Exponent 126, random sign and mantissa: ±[0.5, 1), far from denormals, infinities and NaN.
    if (element == Element::fp32) word = (word & 0x807fffffu) | 0x3f000000u;
    if (element == Element::bf16) word = (word & 0x807f807fu) | 0x3f003f00u;
    std::memcpy(operands.bytes + at, &word, 4);
  }
  return operands;
}

Rate loop_rate(const Kind& kind, int threads, double seconds) {
  std::vector<Operands> operands;
  for (int i = 0; i < threads; ++i) operands.push_back(random_operands(kind.element, i));
  const auto step = [&](int i) { return kind.loop(operands[i].bytes, kind.iterations); };
  return total_rate(threads, seconds, [](int) {}, step);
}

// All last-level caches that this process may use. sysconf would name one number for the whole chip, also where a
// virtual machine has a small part of it.
size_t last_cache_bytes() {
  std::map<std::string, size_t> caches;  // the processors that share a cache → its KiB
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  sched_getaffinity(0, sizeof allowed, &allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    const std::string cache = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cache/index3/";
    std::string shared_by;
    size_t kib;
    if (CPU_ISSET(cpu, &allowed) && std::ifstream(cache + "shared_cpu_list") >> shared_by &&
        std::ifstream(cache + "size") >> kib)
      caches[shared_by] = kib;
  }
#endif
  size_t total = 0;
  for (const auto& [shared_by, kib] : caches) total += kib << 10;
  return total > 0 ? total : size_t(64) << 20;
}

// memcpy of a buffer of four times the last-level cache, its parts spread over the threads. Counts what memory sees:
// each byte is read once and written once.
Rate copy_rate(int threads, double seconds) {
  const size_t part = (4 * last_cache_bytes() / threads + 4095) / 4096 * 4096;
  std::vector<std::vector<unsigned char>> from(threads), to(threads);
  const auto prepare = [&](int i) {
    from[i].assign(part, static_cast<unsigned char>(i + 1));
    to[i].assign(part, 0);
  };
  const auto step = [&](int i) {
    std::memcpy(to[i].data(), from[i].data(), part);
    asm volatile("" : : "r"(to[i].data()) : "memory");  // the copy is wanted although nobody reads it
    return 2.0 * part;
  };
  return total_rate(threads, seconds, prepare, step);
}

std::pair<double, double> peak(const std::string& name, int threads, double seconds) {
  if (threads < 1 || !(seconds > 0)) throw std::invalid_argument("peak needs threads >= 1 and seconds > 0");
  const auto pair = [](const Rate& rate) { return std::pair(rate.over_all, rate.of_steps); };
  if (name == "copy") return pair(copy_rate(threads, seconds));
  for (const Kind& kind : kinds())
    if (name == kind.name) return pair(loop_rate(kind, threads, seconds));
  throw std::invalid_argument("peak " + name + " is not one that this processor can run; _cpu.peak_kinds() lists them");
}

std::vector<std::string> peak_kinds(bool capped) {
  std::vector<std::string> names;
  for (const Kind& kind : kinds())
    if (!capped || kind.isa <= active_isa()) names.push_back(kind.name);
  names.push_back("copy");
  return names;
}

}  // namespace

void bind_peak(py::module_& module) {
  module.def("peak_kinds", peak_kinds, py::arg("capped") = false,
             "The names that `peak` accepts on this processor; `capped`: that kernels may use now (`set_isa_cap`).");
  module.def("peak", peak, py::arg("kind"), py::arg("threads"), py::arg("seconds"),
             py::call_guard<py::gil_scoped_release>(),
             "Operations per second (a multiply-add counts as two), or for \"copy\" bytes read and written per second,"
             " of `threads` pinned threads together: over all the time, and of each thread's median step of a fraction of"
             " a millisecond (a copy: of all its bytes), which leaves out what others took of the processor.");
}
