// Normative: the formula of linear_rows.h, one sum at a time.
#include "csrc/linear_rows/linear_rows.h"

namespace qk {

void scale_rows_scalar(const ScaleRun& run) {
  const int64_t bytes = output_bytes(run.output);
  for (int64_t i = 0; i < run.n; ++i) {
    const float v = row_scaled(run.acc[i], run.zero_point, run.weight_sum[i], run.scale,
                               run.weight_scale[i], run.bias == nullptr ? 0.0f : run.bias[i]);
    store_float(run.output, v, static_cast<char*>(run.out) + i * bytes);
  }
}

}  // namespace qk
