// Every row of a float matrix onto a grid of its own, chosen from its extremes: what a linear layer
// with activations quantized when they arrive ("dynamic", "per token") reads.
//
//   scale[r], zero_point[r]   choose_dynamic_grid (csrc/base/numerics.h) of row r's min and max
//   q[r, k]                   quantize(x[r, k]) on that grid
//
// Layout: rows of `depth` contiguous elements at any one stride; q is dense [rows, depth]. x is
// float32, bfloat16 or float16 (computed in float32), q is uint8 or int8.
// Memory: owned by the caller; x and q must not overlap.
// Numbers: bit-equal on every ISA and for every thread count. A row with NaN or infinities has the
// scale NaN and the codes that it gives; the other rows do not notice.
// Trick: a row is still in the cache when its codes follow its extremes; both passes are the
// kernels of observe and quantize.
#pragma once

#include <cstdint>

#include "csrc/base/dtype.h"
#include "csrc/base/numerics.h"
#include "csrc/base/parallel.h"

namespace qk {

struct QuantizeRowsArgs {
  const void* x;
  FloatType type;
  int64_t rows, depth, row_stride;  // in elements
  void* q;
  bool q_signed;
  int32_t qmin, qmax;
  bool symmetric;
  float* scale;         // [rows]
  int32_t* zero_point;  // [rows]
};

void quantize_rows(const QuantizeRowsArgs& args, const Parallel& parallel);

}  // namespace qk
