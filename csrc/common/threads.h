// Runs numbered tasks on PyTorch's own threads, those of its OpenMP runtime.
//
// After each of PyTorch's operations they wait for the next one actively, for milliseconds: threads of ours would have to
// share the cores with them (measured: a decode of 1.44 s beside 1.03 s on two cores). The kernels never link to the
// runtime: its one function is looked up in the process. Where there is none (a PyTorch without OpenMP), and in a forked
// child, which has none of its parent's threads, a pool of this module's does the work.
//
// Which thread runs which task is not fixed, so a result must depend on the task's number only. Any number of Python
// threads may call at once: OpenMP gives each its own team; of the pool, the first gets it and the others do their tasks
// themselves.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sana {

void run_tasks(int threads, int64_t tasks, void (*task)(void* context, int64_t index), void* context);

// Calls f(0) ... f(tasks - 1) on at most `threads` threads, this one among them, and returns when all are done. f must
// not throw; a parallel_for inside f runs on f's thread.
template <class F>
void parallel_for(int threads, int64_t tasks, F&& f) {
  using Function = std::remove_reference_t<F>;
  run_tasks(threads, tasks, [](void* context, int64_t index) { (*static_cast<Function*>(context))(index); },
            const_cast<std::remove_const_t<Function>*>(&f));
}

}  // namespace sana
