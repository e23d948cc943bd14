// The last part of making a program: which operations run on slices of the batch, which buffers
// share memory, and where each lies.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/base/parallel.h"
#include "csrc/plan/program.h"
#include "csrc/plan/view.h"

namespace qk::plan {

enum class Home { kArena, kConstant, kInput, kOutput };

struct Buffer {
  Home home = Home::kArena;
  int64_t bytes = 0;
  int index = 0;                     // of the input or output
  const uint8_t* data = nullptr;     // of a constant
  int first = INT32_MAX, last = -1;  // operations
  int merged_into = -1;
  int slicing = -1;  // the only one that uses it: it holds one slice
};

// Operation `operation` may write its output over `from`, which it reads element by element, if
// that has at least `least` bytes.
struct Overwrite {
  int operation, from, to;
  int64_t least;
};

// A program whose addresses are still buffers: Ref::base is an index of `buffers`, or negative.
struct Draft {
  std::vector<Buffer> buffers;
  std::vector<Overwrite> overwrites;
  std::vector<std::vector<View>> views;  // of every operation: what it reads, then what it writes
  std::vector<int64_t> weights;          // of every operation: bytes of its constants
};

// The slices of the program: see Slicing. `cache`: the bytes of a thread's cache.
std::vector<Slicing> choose_slicings(const Program& program, const Draft& draft, int64_t batch,
                                     int64_t cache, int threads);

// Gives every operation its addresses and the program its arena.
void place(const Parallel& parallel, int64_t batch, int64_t cache, int input_count, Draft* draft,
           Program* program);

}  // namespace qk::plan
