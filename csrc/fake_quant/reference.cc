// Normative: the formula of fake_quant.h, one element at a time.
#include "csrc/base/numerics.h"
#include "csrc/fake_quant/fake_quant.h"

namespace qk {
namespace {

template <typename T>
void fake_quant_scalar(const FakeQuantRun& run) {
  const T* x = static_cast<const T*>(run.x);
  T* y = static_cast<T*>(run.y);
  for (int64_t i = 0; i < run.n; ++i) {
    const int64_t c = run.grid.per_element ? i : 0;
    from_float(fake_quant(to_float(x[i]), run.grid.scale[c], run.grid.inv_scale[c],
                          run.grid.zero_point[c], run.qmin, run.qmax),
               y + i);
  }
}

}  // namespace

void fake_quant_f32_scalar(const FakeQuantRun& run) { fake_quant_scalar<float>(run); }
void fake_quant_bf16_scalar(const FakeQuantRun& run) { fake_quant_scalar<BFloat16>(run); }
void fake_quant_f16_scalar(const FakeQuantRun& run) { fake_quant_scalar<Float16>(run); }

}  // namespace qk
