#include "python/quantize.h"

namespace qk::seam {

GridCall<FakeQuantArgs> check_fake_quant(const Tensor& x, const Tensor& scale,
                                         const Tensor& zero_point, std::optional<int64_t> axis,
                                         int64_t qmin, int64_t qmax, Tensor out) {
  const FloatType type = check_float_type("fake_quant", "x", x);
  axis = check_axis("fake_quant", x, axis);
  GridCall<FakeQuantArgs> call{
      x, axis, check_grid("fake_quant", x, scale, zero_point, axis, qmin, qmax), {}};
  STD_TORCH_CHECK(qmin >= -kFakeQuantLimit && qmax <= kFakeQuantLimit,
                  "fake_quant: qmin and qmax must be in [-2^21, 2^21], got qmin ", qmin,
                  " and qmax ", qmax);
  check_out("fake_quant", x, out, x.scalar_type(),
            {{"x", x, true}, {"scale", scale}, {"zero_point", zero_point}});
  const GridLayout layout = plan_grid(out, &call.x, axis, call.grid);
  call.args = {.x = call.x.const_data_ptr(),
               .y = out.mutable_data_ptr(),
               .type = type,
               .qmin = static_cast<int32_t>(qmin),
               .qmax = static_cast<int32_t>(qmax),
               .grid = layout};
  return call;
}

namespace {

void fake_quant_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                    std::optional<int64_t> axis, int64_t qmin, int64_t qmax, Tensor out) {
  qk::fake_quant(check_fake_quant(x, scale, zero_point, axis, qmin, qmax, out).args,
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
