// Linear layer on packed weights: out[r, n] = epilogue(sum over k of (a[r, k] - za)(w[n, k] -
// zw[n])).
//
// Layout: input rows of `depth` bytes at any one row stride (0 repeats a row); out dense [rows, n],
//   float32 if the codes are dequantized.
// Memory: owned by the caller. Numbers: those of igemm.h, for any number of threads.
// Trick: threads share out rows x panels so that the largest part is as small as it can be; a GEMV
//   is split over panels only, so that each thread streams its own weights.
#pragma once

#include "csrc/base/parallel.h"
#include "csrc/gemm/dequantized.h"

namespace qk {

struct LinearArgs {
  PackedMatrix matrix;
  const uint8_t* input;
  int64_t rows, input_row_stride;
  void* out;
  const uint8_t* residual;
  int64_t residual_row_stride;
  bool residual_signed;
  NextWeights next = {};
  DequantizedOutput floats = {};
  void* workspace = nullptr;
};

// 0 unless the codes are dequantized.
int64_t linear_workspace_bytes(const LinearArgs& args, const Parallel& parallel);

void linear(const LinearArgs& args, const Parallel& parallel);

// About how long `rows` rows take on one core.
int64_t linear_work_ns(const PackedHeader& header, int64_t rows);

}  // namespace qk
