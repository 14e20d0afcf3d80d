#include "common/threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace sana {
namespace {

constexpr int kMostRanges = 64;  // threads beyond share one

// Tasks of one thread's share that nobody has begun, on a cache line of their own.
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Long enough to bridge the passes of one op, short enough to leave the cores to PyTorch's own threads afterwards.
constexpr auto kSpin = std::chrono::microseconds(50);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

template <class Condition>
void spin_until(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  while (!condition() && std::chrono::steady_clock::now() < end)
    for (int i = 0; i < 16 && !condition(); ++i) pause();
}

// One job at a time. Its tasks are shared out in equal ranges, so that neighbouring tasks, which use the same memory, find
// it in one core's caches, and so do the next job's; a thread that has done its own goes on with the others'. A worker
// that wakes up late finds the job closed and is not waited for, so a core that is busy with something else costs its
// share of the work but no delay.
class Pool {
 public:
  // False: another thread has the pool.
  bool run(int threads, int64_t tasks, void (*task)(void*, int64_t), void* context) {
    if (busy_.exchange(true)) return false;
    const int helpers = static_cast<int>(std::min<int64_t>(threads, tasks)) - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < helpers && add_worker()) ++workers_;
      task_ = task;
      context_ = context;
      seats_ = std::min(helpers, workers_);
      ranges_ = std::min(seats_ + 1, kMostRanges);
      for (int r = 0; r < ranges_; ++r) {
        range_[r].next = tasks * r / ranges_;
        range_[r].end = tasks * (r + 1) / ranges_;
      }
      ++job_;
    }
    wake_.notify_all();
    work(0);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      seats_ = 0;
    }
    spin_until([&] { return inside_.load() == 0; });
    {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [&] { return inside_.load() == 0; });
    }
    busy_ = false;
    return true;
  }

 private:
  bool add_worker() {
    try {
      std::thread([this, number = workers_ + 1] { serve(number); }).detach();
      return true;
    } catch (const std::system_error&) {
      return false;  // the machine gives us no more threads; those we have do the work
    }
  }

  void serve(int number) {
    uint64_t seen = 0;
    for (;;) {
      spin_until([&] { return job_.load() != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return job_.load() != seen; });
      seen = job_.load();
      if (seats_ == 0) continue;
      --seats_;
      ++inside_;
      lock.unlock();
      work(number);
      lock.lock();
      if (--inside_ == 0) done_.notify_one();
    }
  }

  void work(int number) {
    for (int r = 0; r < ranges_; ++r) {
      Range& range = range_[(number + r) % ranges_];
      while (range.next.load() < range.end)  // first only read: the line may be every core's
        if (const int64_t index = range.next.fetch_add(1); index < range.end) task_(context_, index);
    }
  }

  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  int workers_ = 0;
  std::atomic<uint64_t> job_{0};  // its number; written under the mutex
  int seats_ = 0;                 // helpers that may still join the job
  std::atomic<int> inside_{0};    // helpers that have joined and not yet left
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int ranges_ = 0;
  Range range_[kMostRanges];
};

// Never destroyed: its threads may still be asleep in it when the process ends.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  Pool* current = pool.load();
  if (current != nullptr) return *current;
#if !defined(_WIN32)
  // A forked child has none of the threads, and possibly a locked mutex: it forgets the pool.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
  (void)registered;
#endif
  Pool* fresh = new Pool;
  if (pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;  // another thread was faster
  return *current;
}

}  // namespace

void run_tasks(int threads, int64_t tasks, void (*task)(void*, int64_t), void* context) {
  if (threads > 1 && tasks > 1 && the_pool().run(threads, tasks, task, context)) return;
  for (int64_t index = 0; index < tasks; ++index) task(context, index);
}

}  // namespace sana
