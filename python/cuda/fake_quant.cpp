#include "csrc/fake_quant/cuda.h"
#include "python/cuda/adapt.h"

namespace qk::seam {
namespace {

void fake_quant_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                    std::optional<int64_t> axis, int64_t qmin, int64_t qmax, Tensor out) {
  constexpr const char* kOp = "fake_quant";
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, kOp, ": x must be float32 on CUDA, got ",
                  dtype_text(x.scalar_type()));
  check_same_device(kOp, "scale", scale, x);
  check_same_device(kOp, "zero_point", zero_point, x);
  check_same_device(kOp, "out", out, x);
  STD_TORCH_CHECK(
      out.scalar_type() == x.scalar_type() && out.is_contiguous() && out.sizes() == x.sizes(), kOp,
      ": out must be a contiguous float32 tensor of shape ", shape_text(x), ", got ",
      dtype_text(out.scalar_type()), " ", shape_text(out));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  axis = check_axis(kOp, x, axis);
  const GridView grid = check_grid(kOp, x, scale, zero_point, axis, qmin, qmax);
  const ChannelSplit split = split_channels(x, axis);
  const Tensor xc = torch::stable::contiguous(x);
  check_launch(kOp, fake_quant_cuda({.x = xc.const_data_ptr<float>(),
                                     .y = out.mutable_data_ptr<float>(),
                                     .outer = split.outer,
                                     .channels = split.channels,
                                     .inner = split.inner,
                                     .scale = grid.scale,
                                     .zero_point = grid.zero_point,
                                     .qmin = static_cast<int32_t>(qmin),
                                     .qmax = static_cast<int32_t>(qmax)},
                                    current_stream(x.get_device_index())));
}

Tensor fake_quant(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                  std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  Tensor out = torch::stable::new_empty(x, x.sizes());
  fake_quant_out(x, scale, zero_point, axis, qmin, qmax, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("fake_quant", TORCH_BOX(&fake_quant));
  m.impl("fake_quant_out", TORCH_BOX(&fake_quant_out));
}

}  // namespace qk::seam
