// The SIMT machine: blocks one after the other, their threads as fibers, barriers, and warp operations.
//
// A thread runs until it has to wait for others. Between two barriers the warps run one after the other, each as far as
// it can; within a warp, between two warp operations, so do the lanes. SANA_EMULATOR_SEED in the environment chooses
// the order of blocks, warps and lanes: 0 forward, 1 backward, else shuffled anew each time. So under the seeds 0 and 1
// every two lanes, every two warps and every two blocks have met in both orders in every stretch without a barrier
// between them: a result that depends on who comes first differs from the right one under at least one of them. (Blocks
// do not overlap: one that waits for another, as cooperative kernels do, would wait for ever.)
//
// Shared memory is poisoned before every block: with NaN (0xff) under even seeds, and under odd ones with a large
// finite pattern (0x4d), which max(x, 0) does not swallow.
#pragma once

#include <cuda_runtime.h>
#include <link.h>
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulator/fiber.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace sana {
namespace emulator {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr size_t kMaxShared = 99 * 1024;  // what a block can have on every target; sm_86, sm_89 and sm_120 set it

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The line of a kernel that calls an emulated function; the value of a default argument.
struct Where {
  const char* file;
  int line;
  static Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

inline std::string place(const Where& where) {
  const char* slash = std::strrchr(where.file, '/');
  return std::string(slash == nullptr ? where.file : slash + 1) + ":" + std::to_string(where.line);
}

struct Wait {
  const char* what = nullptr;  // null: not waiting
  Where where{};
  unsigned mask = 0;  // the lanes that take part; 0: all threads of the block
  void* data = nullptr;
  void (*combine)(void* const* lanes, unsigned mask) = nullptr;  // computes the results of all lanes, once all wait

  bool same(const Wait& other) const {
    return what != nullptr && other.what != nullptr && std::strcmp(what, other.what) == 0 && mask == other.mask &&
           where.line == other.where.line && std::strcmp(where.file, other.where.file) == 0;
  }
};

// One cp.async on its way.
struct Copy {
  void* to;
  const void* from;
  int valid, bytes, group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int lane;
  bool done;
  Wait wait;
  std::vector<Copy> copies;
  int copy_group;
};

inline std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

inline thread_local char shared_anchor;  // the __shared__ variables are this library's other thread_local ones

// The memory of this library's thread_local variables.
inline std::pair<char*, size_t> static_shared() {
  shared_anchor = 0;  // an untouched one is not allocated yet
  std::pair<char*, size_t> found{nullptr, 0};
  auto visit = [](dl_phdr_info* library, size_t, void* result) {
    auto* begin = static_cast<char*>(library->dlpi_tls_data);
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const size_t size = library->dlpi_phdr[i].p_memsz;
      if (library->dlpi_phdr[i].p_type != PT_TLS || &shared_anchor < begin || &shared_anchor >= begin + size) continue;
      *static_cast<std::pair<char*, size_t>*>(result) = {begin, size};
    }
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  return found;
}

class Machine {
 public:
  // Runs kernel() in every thread. Throws Failure.
  void run(dim3 grid, dim3 block, size_t shared, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> one_launch_at_a_time(mutex_);
    const size_t threads = size_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64) throw Failure("a block has 1 to 1024 threads, 64 along z");
    const size_t blocks = size_t{grid.x} * grid.y * grid.z;
    if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
      throw Failure("a grid has at least one block, and at most 65535 along y and z");
    }
    if (shared > kMaxShared) throw Failure("not every target has more than 99 KB of shared memory per block");
    kernel_ = std::move(kernel);
    const char* seed = std::getenv("SANA_EMULATOR_SEED");
    seed_ = seed == nullptr ? 0 : std::atoi(seed);
    random_.seed(seed_);
    dynamic_shared_ = dynamic_pages_.end() - (shared + 15) / 16 * 16;
    blockDim = block;
    gridDim = grid;
    while (pool_.size() < threads) pool_.push_back(std::make_unique<Thread>());
    count_ = threads;
    const SignalHandlers handlers;
    for (const size_t i : order(blocks)) {
      blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
      try {
        run_block();
      } catch (const Failure& failure) {
        throw Failure("block " + text(blockIdx) + ": " + failure.what());
      }
    }
  }

  Thread& current() { return *current_; }
  char* dynamic_shared() { return dynamic_shared_; }
  bool in_shared(const void* address, size_t bytes) const {
    auto* p = static_cast<const char*>(address);
    auto within = [&](const char* begin, const char* end) { return p >= begin && p + bytes <= end; };
    const auto [begin, size] = static_shared_;
    return within(begin, begin + size) || within(dynamic_shared_, dynamic_pages_.end());
  }
  int poison() const { return seed_ % 2 == 0 ? 0xff : 0x4d; }

  // The running thread gives way until what it waits for has happened.
  void wait(const Wait& wait) {
    if (wait.mask != 0 && (wait.mask >> current_->lane & 1) == 0) {
      fail(std::string(wait.what) + " at " + place(wait.where) + ": the mask leaves the calling lane out");
    }
    current_->wait = wait;
    current_->fiber.leave(scheduler_);
  }

  // Ends the launch from within a thread.
  [[noreturn]] void fail(const std::string& message) {
    failure_ = "thread " + text(threadIdx) + ": " + message;
    current_->fiber.leave(scheduler_);
    std::abort();  // a failed launch is never resumed
  }

 private:
  std::vector<size_t> order(size_t count) {
    std::vector<size_t> result(count);
    std::iota(result.begin(), result.end(), 0);
    if (seed_ == 1) std::reverse(result.begin(), result.end());
    if (seed_ > 1) std::shuffle(result.begin(), result.end(), random_);
    return result;
  }

  void run_block() {
    static_shared_ = emulator::static_shared();
    std::memset(static_shared_.first, poison(), static_shared_.second);
    std::memset(dynamic_shared_, poison(), dynamic_pages_.end() - dynamic_shared_);
    for (size_t i = 0; i < count_; ++i) {
      Thread& thread = *pool_[i];
      thread.index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                      unsigned(i / blockDim.x / blockDim.y)};
      thread.lane = i % kWarp;
      thread.done = false;
      thread.wait = {};
      thread.copies.clear();
      thread.copy_group = 0;
      thread.fiber.start(thread_main);
    }
    do {
      for (const size_t warp : order((count_ + kWarp - 1) / kWarp)) run_warp(warp * kWarp);
    } while (!all([](const Thread& thread) { return thread.done; }) && open_barrier());
  }

  void run_warp(size_t first) {
    const size_t lanes = std::min<size_t>(kWarp, count_ - first);
    do {
      for (const size_t lane : order(lanes)) resume(*pool_[first + lane]);
    } while (finish_warp_operations(first, lanes));
  }

  void resume(Thread& thread) {
    if (thread.done || thread.wait.what != nullptr) return;
    current_ = &thread;
    threadIdx = thread.index;
    if (sigsetjmp(fault_, 0) == 0) {
      running_ = true;
      thread.fiber.resume(scheduler_);
    } else {
      failure_ = "thread " + text(thread.index) + ": " + fault_message_;
    }
    running_ = false;
    if (!failure_.empty()) throw Failure(std::exchange(failure_, ""));
  }

  // Carries out every operation whose lanes have all arrived; false if there was none.
  bool finish_warp_operations(size_t first, size_t lanes) {
    bool progress = false;
    for (size_t i = 0; i < lanes; ++i) {
      const Wait wait = pool_[first + i]->wait;
      if (wait.what == nullptr || wait.mask == 0) continue;
      void* data[kWarp] = {};
      bool arrived = true;
      for (size_t lane = 0; lane < kWarp; ++lane) {
        if ((wait.mask >> lane & 1) == 0) continue;
        arrived = arrived && lane < lanes && pool_[first + lane]->wait.same(wait);
        if (arrived) data[lane] = pool_[first + lane]->wait.data;
      }
      if (!arrived) continue;
      if (wait.combine != nullptr) wait.combine(data, wait.mask);
      for (size_t lane = 0; lane < lanes; ++lane) {
        if (wait.mask >> lane & 1) pool_[first + lane]->wait = {};
      }
      progress = true;
    }
    return progress;
  }

  // Nobody can run: lets the block through the barrier at which all its threads wait.
  bool open_barrier() {
    const Wait& first = pool_[0]->wait;
    if (first.mask != 0 || !all([&](const Thread& thread) { return thread.wait.same(first); }))
      throw Failure(deadlock());
    for (size_t i = 0; i < count_; ++i) pool_[i]->wait = {};
    return true;
  }

  template <class Condition>
  bool all(Condition condition) const {
    return std::all_of(pool_.begin(), pool_.begin() + count_, [&](const auto& thread) { return condition(*thread); });
  }

  std::string deadlock() const {
    std::map<std::string, std::pair<int, std::string>> groups;  // where the threads are, how many, and one of them
    for (size_t i = 0; i < count_; ++i) {
      const Thread& thread = *pool_[i];
      std::string state = "have returned";
      if (!thread.done) state = std::string("wait at ") + thread.wait.what + " (" + place(thread.wait.where) + ")";
      char mask[40];
      std::snprintf(mask, sizeof mask, " with the mask 0x%08x", thread.wait.mask);
      if (thread.wait.mask != 0) state += mask;
      auto& [threads, example] = groups[state];
      if (threads++ == 0) example = text(thread.index);
    }
    std::string message = "the threads wait for each other for ever:";
    for (const auto& [state, group] : groups) {
      message += " " + std::to_string(group.first) + " " + state + ", such as thread " + group.second + ";";
    }
    return message + " all threads named must reach the same barrier";
  }

  static void thread_main();

  // While it lives, a fault in a thread ends the launch instead of the process.
  class SignalHandlers {
   public:
    SignalHandlers() {
      static char stack[64 * 1024];
      stack_t mine{};
      mine.ss_sp = stack;
      mine.ss_size = sizeof stack;
      sigaltstack(&mine, &old_stack_);
      struct sigaction action{};
      action.sa_sigaction = on_fault;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // a handler that does not return cannot unblock it
      for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &old_[i]);
    }
    SignalHandlers(const SignalHandlers&) = delete;
    SignalHandlers& operator=(const SignalHandlers&) = delete;
    ~SignalHandlers() {
      for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &old_[i], nullptr);
      sigaltstack(&old_stack_, nullptr);
    }

   private:
    static constexpr int kSignals[] = {SIGSEGV, SIGBUS};
    struct sigaction old_[2];
    stack_t old_stack_;
  };

  static void on_fault(int signal, siginfo_t* info, void*);

  std::mutex mutex_;
  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Thread>> pool_;
  size_t count_ = 0;  // threads of a block
  Thread* current_ = nullptr;
  Context scheduler_;
  GuardedPages dynamic_pages_{kMaxShared};
  char* dynamic_shared_ = nullptr;
  std::pair<char*, size_t> static_shared_{};
  int seed_ = 0;
  std::mt19937 random_;
  std::string failure_;
  char fault_message_[200];
  sigjmp_buf fault_;
  bool running_ = false;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void Machine::thread_main() {
  Machine& m = machine();
  m.kernel_();
  m.current_->done = true;
  m.current_->fiber.leave(m.scheduler_);
}

inline void Machine::on_fault(int signal, siginfo_t* info, void*) {
  Machine& m = machine();
  if (!m.running_) {  // not a kernel's doing
    ::signal(signal, SIG_DFL);
    raise(signal);
    return;
  }
  const char* cause = "touched %p, where there is no buffer: out of bounds";
  if (m.current_->fiber.overflowed_at(info->si_addr)) cause = "overran the 64 KB of its stack";
  std::snprintf(m.fault_message_, sizeof m.fault_message_, cause, info->si_addr);
  siglongjmp(m.fault_, 1);
}

// What the compiler's checks (-fsanitize) found; each of its records begins with the place.
struct Finding {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] inline void report(const char* what, const void* finding) {
  const auto* at = static_cast<const Finding*>(finding);
  machine().fail(std::string(what) + " at " + place({at->file, static_cast<int>(at->line)}));
}

}  // namespace emulator
}  // namespace sana

// The names that the compiler calls. Weak: every source file of a library brings them.
extern "C" {
[[gnu::weak, noreturn]] void __ubsan_handle_type_mismatch_v1_abort(void* finding, void*) {
  sana::emulator::report("unaligned access", finding);
}
[[gnu::weak, noreturn]] void __ubsan_handle_out_of_bounds_abort(void* finding, void*) {
  sana::emulator::report("array index out of bounds", finding);
}
[[gnu::weak, noreturn]] void __ubsan_handle_shift_out_of_bounds_abort(void* finding, void*, void*) {
  sana::emulator::report("shift by too many bits", finding);
}
[[gnu::weak, noreturn]] void __ubsan_handle_divrem_overflow_abort(void* finding, void*, void*) {
  sana::emulator::report("integer division by zero", finding);
}
}
