// Runs numbered tasks on a pool of threads that belongs to this module.
//
// Neighbouring tasks mostly run on one thread, but which runs which is not fixed, so a result must depend on the task's
// number only. Any number of Python threads may call at once: the first gets the pool, the others do their tasks
// themselves. After a fork the child makes a new pool.
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
