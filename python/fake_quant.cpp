#include "csrc/fake_quant/fake_quant.h"

#include "python/adapt.h"

namespace qk::seam {
namespace {

void fake_quant_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                    std::optional<int64_t> axis, int64_t qmin, int64_t qmax, Tensor out) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "fake_quant: x must be float32, got ",
                  dtype_text(x.scalar_type()));
  axis = check_axis("fake_quant", x, axis);
  const GridView grid = check_grid("fake_quant", x, scale, zero_point, axis, qmin, qmax);
  const ChannelSplit split = split_channels(x, axis);
  const Tensor xc = torch::stable::contiguous(x);
  qk::fake_quant({.x = xc.const_data_ptr<float>(),
                  .y = out.mutable_data_ptr<float>(),
                  .outer = split.outer,
                  .channels = split.channels,
                  .inner = split.inner,
                  .scale = grid.scale,
                  .zero_point = grid.zero_point,
                  .qmin = static_cast<int32_t>(qmin),
                  .qmax = static_cast<int32_t>(qmax)},
                 torch_threads());
}

Tensor fake_quant(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                  std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  Tensor out = torch::stable::empty(x.sizes(), x.scalar_type());
  fake_quant_out(x, scale, zero_point, axis, qmin, qmax, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quant", TORCH_BOX(&fake_quant));
  m.impl("fake_quant_out", TORCH_BOX(&fake_quant_out));
}

}  // namespace qk::seam
