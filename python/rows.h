// The arguments of quantize_rows and linear_rows, checked: what their CPU and CUDA halves share.
#pragma once

#include "csrc/linear_rows/linear_rows.h"
#include "csrc/quantize_rows/quantize_rows.h"
#include "python/epilogue.h"
#include "python/layout.h"

namespace qk::seam {

// The tensors own what `args` points at.
struct QuantizeRowsCall {
  Rows x;
  Tensor q, scale, zero_point;  // the results
  QuantizeRowsArgs args;
};
QuantizeRowsCall check_quantize_rows(const Tensor& x, int64_t qmin, int64_t qmax, bool symmetric,
                                     ScalarType dtype);

// What linear_rows checks wherever it runs; the packed weight is checked by the halves.
struct LinearRowsCall {
  Rows input;
  Tensor row_scale, row_zero_point, weight_scale, weight_sum;
  OptionalTensor bias;
  std::vector<int64_t> sizes;  // of the output
  int64_t rows, depth;
  OutputType output;
  RowScales scales;
};
LinearRowsCall check_linear_rows(const Tensor& input, const Tensor& row_scale,
                                 const Tensor& row_zero_point, const Tensor& weight_scale,
                                 const Tensor& weight_sum, const OptionalTensor& bias,
                                 int64_t out_features, ScalarType output_dtype);
// With any zero points of the rows the sums must fit int32.
void check_row_sums(int64_t depth, bool weight_zero_points);

}  // namespace qk::seam
