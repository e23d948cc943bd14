#include "csrc/fake_quant/fake_quant.h"

#include "python/layout.h"

namespace qk::seam {
namespace {

void fake_quant_out(Tensor x, const Tensor& scale, const Tensor& zero_point,
                    std::optional<int64_t> axis, int64_t qmin, int64_t qmax, Tensor out) {
  const FloatType type = check_float_type("fake_quant", "x", x);
  axis = check_axis("fake_quant", x, axis);
  const GridView grid = check_grid("fake_quant", x, scale, zero_point, axis, qmin, qmax);
  STD_TORCH_CHECK(qmin >= -kFakeQuantLimit && qmax <= kFakeQuantLimit,
                  "fake_quant: qmin and qmax must be in [-2^21, 2^21], got qmin ", qmin,
                  " and qmax ", qmax);
  check_out("fake_quant", x, out, x.scalar_type());
  const GridLayout layout = plan_grid(out, &x, axis, grid);
  qk::fake_quant({.x = x.const_data_ptr(),
                  .y = out.mutable_data_ptr(),
                  .type = type,
                  .qmin = static_cast<int32_t>(qmin),
                  .qmax = static_cast<int32_t>(qmax),
                  .grid = layout},
                 torch_threads());
}

Tensor fake_quant(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                  std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  Tensor out = empty_like(x, x.scalar_type());
  fake_quant_out(x, scale, zero_point, axis, qmin, qmax, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quant", TORCH_BOX(&fake_quant));
  m.impl("fake_quant_out", TORCH_BOX(&fake_quant_out));
}

}  // namespace qk::seam
