// Normative: the formula of linear_rows.h, one sum at a time.
#include <cstring>

#include "csrc/linear_rows/linear_rows.h"

namespace qk {

void scale_rows_scalar(const ScaleRun& run) {
  for (int64_t i = 0; i < run.n; ++i) {
    const float v = row_scaled(run.acc[i], run.zero_point, run.weight_sum[i], run.scale,
                               run.weight_scale[i], run.bias == nullptr ? 0.0f : run.bias[i]);
    if (run.output == OutputType::kF32) {
      static_cast<float*>(run.out)[i] = v;
    } else {
      static_cast<uint16_t*>(run.out)[i] = output_half(run.output, v);
    }
  }
}

}  // namespace qk
