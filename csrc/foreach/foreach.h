// All weights of a model in one call: their grids chosen, fake-quantized, turned into codes, or
// their gradients passed, with one fork of the threads for all of them.
//
//   grid   choose_scale, choose_zero_point (csrc/base/numerics.h) of the extremes of a row, if
//          asked; an empty row has that of a row of zeros
//   y      fake_quant(x) on the grid of its row
//   q      quantize(x) on the same grid
//   out    fake_quant_backward(grad, x)
//
// Layout: an item is `rows` contiguous rows of `inner` elements, one grid a row (a weight with
// output channels first; per tensor: one row).
// Memory: owned by the caller; y must not overlap x, out may alias grad exactly.
// Numbers: those of observe, fake_quant, quantize and fake_quant_backward; equal bits on every ISA
// and for every thread count.
// Trick: extremes, output and codes of a row are done while it is in the cache; tasks are rows of
// any item, so that small tensors share the threads with large ones.
#pragma once

#include <cstdint>

#include "csrc/base/dtype.h"
#include "csrc/base/numerics.h"
#include "csrc/base/parallel.h"

namespace qk {

struct ForeachItem {
  const void* x;
  FloatType type;
  int64_t rows;
  int64_t inner;
  float* scale;         // [rows]; written if grids are chosen
  int32_t* zero_point;  // [rows]
};

// What became of a row whose grid was chosen.
enum RowFlag : uint8_t { kRowFine = 0, kRowClipped = 1, kRowNotFinite = 2 };

struct ForeachQuantItem {
  ForeachItem in;
  void* y;         // null: none
  void* q;         // null: no codes
  uint8_t* flags;  // [rows]; null: the grid is given
};

struct ForeachQuantArgs {
  const ForeachQuantItem* items;
  int64_t count;
  GridRule rule;
  bool q_signed;
};

void foreach_fake_quant(const ForeachQuantArgs& args, const Parallel& parallel);

struct ForeachBackwardItem {
  ForeachItem in;
  const void* grad;
  void* out;
};

struct ForeachBackwardArgs {
  const ForeachBackwardItem* items;
  int64_t count;
  int32_t qmin;
  int32_t qmax;
};

void foreach_fake_quant_backward(const ForeachBackwardArgs& args, const Parallel& parallel);

}  // namespace qk
