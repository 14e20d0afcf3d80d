// A buffer that outlives the call: fresh pages would have to be cleared by the operating system every time.
//
//     static thread_local Scratch scratch;
//     char* buffer = scratch.reserve(bytes);
//
// Only for files without an instruction set in their name.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/integers.h"

namespace sana {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `bytes`, on a cache line's boundary, with any content; null where there is no memory.
  char* reserve(int64_t bytes) {
    if (size_ < bytes) {
      std::free(data_);
      size_ = round_up(bytes, 64);
      data_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace sana
