// Normative: the formula of fake_quant.h, one element at a time.
#include "csrc/base/numerics.h"
#include "csrc/fake_quant/fake_quant.h"

namespace qk {

void fake_quant_f32_scalar(const float* x, float* y, int64_t n, float scale, int32_t zero_point,
                           int32_t qmin, int32_t qmax) {
  const float inv_scale = 1.0f / scale;
  for (int64_t i = 0; i < n; ++i) {
    y[i] = fake_quant(x[i], scale, inv_scale, zero_point, qmin, qmax);
  }
}

}  // namespace qk
