// Linear layer on rows that have grids of their own (csrc/quantize_rows): float out.
//
//   acc[r, n] = sum over k of q[r, k] * (w[n, k] - zw[n])                              exact int32
//   out[r, n] = float(acc - zero_point[r] * weight_sum[n]) * (scale[r] * weight_scale[n]) + bias[n]
//   weight_sum[n] = sum over k of (w[n, k] - zw[n])
//
// Layout: input rows of `depth` bytes at any one row stride; out dense [rows, n], float32, bfloat16
//   or float16 (RNE of the float32 value). The weight is packed by pack_igemm for an int32 output
//   and the input zero point 0: it knows nothing of the rows.
// Memory: owned by the caller.
// Numbers: row_scaled() of csrc/base/numerics.h: the same bits on every ISA, for any number of
//   threads.
// Trick: igemm writes its sums to a buffer that stays in the cache, and one pass scales them; so
//   the matrix kernels need not know of rows.
#pragma once

#include "csrc/gemm/linear.h"

namespace qk {

struct LinearRowsArgs {
  PackedMatrix matrix;
  const uint8_t* input;
  int64_t rows, input_row_stride;
  RowScales scales;
  OutputType output;
  void* out;
};

void linear_rows(const LinearRowsArgs& args, const Parallel& parallel);

// n sums of one row.
struct ScaleRun {
  const int32_t* acc;
  int64_t n;
  int32_t zero_point;
  float scale;
  const float* weight_scale;
  const int32_t* weight_sum;
  const float* bias;  // or nullptr
  OutputType output;
  void* out;
};
using ScaleKernel = void (*)(const ScaleRun& run);

#define QK_SCALE_KERNEL(features, name) void name(const ScaleRun&);
#include "csrc/linear_rows/kernels.inc"
#undef QK_SCALE_KERNEL

ScaleKernel select_scale_kernel(CpuFeatures features = cpu_features_active());

}  // namespace qk
