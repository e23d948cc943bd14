// Moving elements between layouts: copies, transposes, slices, concatenation; optionally through a
// table of 256 codes.
//
//   out[i] = in[i], or table[in[i]] (elements of one byte)
//
// Layout: any two strided views of one shape. Memory: the caller's; the views must not overlap.
// Trick: where both are contiguous inside, rows go through memcpy or the lookup kernel, many to a
//   call; bytes are transposed by the kernels of images; any other transpose works in tiles, so
//   that both sides stay in L1.
#pragma once

#include "csrc/base/parallel.h"
#include "csrc/base/strided.h"
#include "csrc/pointwise/pointwise.h"

namespace qk::plan {

struct MoveArgs {
  const uint8_t* in = nullptr;
  uint8_t* out = nullptr;
  int64_t element = 1;             // bytes: 1, 2 or 4
  const uint8_t* table = nullptr;  // needs element 1
  StridedLayout<2> layout;         // operands: out, in; in the order of out
};

void move(const MoveArgs& args, const Parallel& parallel);

// out[n, y, x, :] = in[n, index_y[y], index_x[x], :], in three spatial dimensions.
struct ResizeArgs {
  const uint8_t* in = nullptr;
  uint8_t* out = nullptr;
  int64_t batch = 0, pixel_bytes = 0;
  int64_t in_size[3] = {}, out_size[3] = {};
  const int64_t* index[3] = {};
};
void resize(const ResizeArgs& args, const Parallel& parallel);

}  // namespace qk::plan
