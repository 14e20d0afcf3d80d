// A function with a stack of its own that can be left in the middle and resumed: what a CUDA thread is on the host.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) || defined(SANA_EMULATED_UCONTEXT)
#define SANA_FIBER_UCONTEXT 1
#include <ucontext.h>
#else
#define SANA_FIBER_UCONTEXT 0
#endif

namespace sana {
namespace emulator {

#if SANA_FIBER_UCONTEXT

// POSIX's switch also saves the signal mask, a system call each time: a kernel with many barriers takes thrice as long.
class Context {
 public:
  void prepare(void* stack, size_t size, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void change(Context& from, const Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

#else

// Saves what the x86-64 calling convention preserves on the running stack, and continues on the other one.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n"
      "mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
      "ret");
}

class Context {
 public:
  void prepare(void* stack, size_t size, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack) + size;  // a multiple of 16
    auto slots = reinterpret_cast<uintptr_t*>(top) - 8;  // six registers, the address to go to, entry's return address
    for (int i = 0; i < 8; ++i) slots[i] = 0;
    slots[6] = reinterpret_cast<uintptr_t>(entry);
    stack_pointer_ = slots;
  }
  static void change(Context& from, const Context& to) { switch_stack(&from.stack_pointer_, to.stack_pointer_); }

 private:
  void* stack_pointer_;
};

#endif

// Pages that end (and begin) where no access is allowed, so that running over their end is a fault.
class GuardedPages {
 public:
  explicit GuardedPages(size_t bytes) : size_((bytes + kPage - 1) / kPage * kPage) {
    void* pages = mmap(nullptr, size_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<char*>(pages) + kPage;
    if (mprotect(begin_, size_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;
  ~GuardedPages() { munmap(begin_ - kPage, size_ + 2 * kPage); }

  char* begin() const { return begin_; }
  char* end() const { return begin_ + size_; }
  size_t size() const { return size_; }
  bool below(const void* address) const { return address < begin_ && address >= begin_ - kPage; }

 private:
  static constexpr size_t kPage = 4096;
  size_t size_;
  char* begin_;
};

class Fiber {
 public:
  Fiber() : stack_(kStack) {}
  void start(void (*entry)()) { context_.prepare(stack_.begin(), stack_.size(), entry); }  // runs at the next resume
  void resume(Context& caller) { Context::change(caller, context_); }
  void leave(const Context& caller) { Context::change(context_, caller); }
  bool overflowed_at(const void* address) const { return stack_.below(address); }

  static constexpr size_t kStack = 64 * 1024;

 private:
  GuardedPages stack_;
  Context context_;
};

}  // namespace emulator
}  // namespace sana
