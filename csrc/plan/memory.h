// Memory of a plan: aligned blocks, and the places of buffers in one arena.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "csrc/base/integers.h"

namespace qk::plan {

inline constexpr int64_t kMemoryAlign = 64;

// A 64-byte aligned block that may be missing: allocation never throws, and one that fails leaves
// the block of before.
class Block {
 public:
  bool allocate(int64_t bytes) {
    constexpr int64_t kMost = int64_t{1} << 46;
    if (bytes < 0 || bytes > kMost) return false;
    const size_t size = static_cast<size_t>(align_up(bytes > 0 ? bytes : 1, kMemoryAlign));
    auto* data =
        static_cast<uint8_t*>(::operator new(size, std::align_val_t{kMemoryAlign}, std::nothrow));
    if (data == nullptr) return false;
    data_.reset(data);
    bytes_ = bytes;
    return true;
  }
  uint8_t* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t{kMemoryAlign}); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  int64_t bytes_ = 0;
};

// A buffer that is in use from operation `first` to operation `last`, both included.
struct Lifetime {
  int64_t bytes = 0;
  int first = 0, last = 0;
  int64_t offset = 0;  // the result
};

// Gives every buffer an offset so that no two that live at the same time overlap; returns the size
// of the arena. Largest first, each into the smallest gap that holds it.
int64_t place_buffers(std::vector<Lifetime>* buffers);

}  // namespace qk::plan
