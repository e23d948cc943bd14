// Pools and interpolation.
#include <cmath>

#include "csrc/plan/builder.h"
#include "csrc/plan/kernel_names.h"

namespace qk::plan {
namespace {

// `torch.nn.functional.interpolate`'s nearest source index, float32 arithmetic included.
struct NearestIndex {
  int64_t in, out;
  float scale;
  bool exact, shortcuts;

  NearestIndex(int64_t in, int64_t out, const InterpolateStep& s, int d)
      : in(in),
        out(out),
        scale(s.sized ? static_cast<float>(in) / static_cast<float>(out)
                      : static_cast<float>(1.0 / s.factor[d])),
        exact(s.exact),
        shortcuts(!s.exact && s.dims > 1) {}

  int64_t operator()(int64_t i) const {
    if (shortcuts && out == in) return i;
    if (shortcuts && out == 2 * in) return i >> 1;
    const float at = exact ? static_cast<float>((static_cast<double>(i) + 0.5) * scale)
                           : static_cast<float>(i) * scale;
    const auto index = static_cast<int64_t>(std::floor(at));
    return index < in - 1 ? index : in - 1;
  }
};

PoolGeometry geometry_of(const PoolStep& s, const View& in, const View& out, bool adaptive) {
  const ConvExtent extent = extent_of(in, out);
  PoolGeometry g{};
  g.batch = in.size[0];
  g.channels = in.size[1];
  g.adaptive = adaptive;
  for (int d = 0; d < 3; ++d) {
    g.in[d] = extent.in[d];
    g.out[d] = extent.out[d];
    g.kernel[d] = s.kernel[d];
    g.stride[d] = s.stride[d];
    g.padding[d] = s.padding[d];
    g.dilation[d] = s.dilation[d];
  }
  return g;
}

}  // namespace

void Builder::lower_max_pool(const Step& step, View* out) {
  PoolStrides strides;
  const View x = as_pixels(input(step, 0), &strides.q);
  allocate_pixels(step, out);
  if (out->size.elements() == 0) return;
  pixel_stride(*out, &strides.out);
  MaxPoolOp op;
  op.args = {nullptr, nullptr, is_signed(x), geometry_of(step.as<PoolStep>(), x, *out, false),
             strides};
  op.q = ref(x);
  op.out = ref(*out);
  emit(op, "max_pool", max_pool_kernel_name(), {&x}, *out);
  mention_cat(step);
}

void Builder::lower_avg_pool(const Step& step, View* out) {
  const auto& s = step.as<PoolStep>();
  PoolStrides strides;
  const View x = as_pixels(input(step, 0), &strides.q);
  allocate_pixels(step, out);
  if (out->size.elements() == 0) return;
  pixel_stride(*out, &strides.out);
  AvgPoolOp op;
  op.args = {.q = nullptr,
             .out = nullptr,
             .q_signed = is_signed(x),
             .out_signed = is_signed(*out),
             .geometry = geometry_of(s, x, *out, step.kind == StepKind::kAdaptiveAvgPool),
             .count_include_pad = s.count_include_pad,
             .divisor = s.divisor,
             .scale_ratio = s.input.scale / s.output.scale,
             .q_zero_point = s.input.zero_point,
             .out_zero_point = s.output.zero_point,
             .qmin = s.output.qmin,
             .qmax = s.output.qmax,
             .strides = strides};
  op.q = ref(x);
  op.out = ref(*out);
  emit(op, step_kind_name(step.kind), avg_pool_kernel_name(), {&x}, *out);
  mention_cat(step);
}

void Builder::lower_interpolate(const Step& step, View* out) {
  const auto& s = step.as<InterpolateStep>();
  const View x = as_channels_last(input(step, 0));
  set_channels_last(out);
  allocate(out);
  if (out->size.elements() == 0) return;
  const ConvExtent extent = extent_of(x, *out);
  ResizeOp op;
  op.args.batch = x.size[0];
  op.args.pixel_bytes = x.size[1];
  for (int d = 0; d < 3; ++d) {
    op.args.in_size[d] = extent.in[d];
    op.args.out_size[d] = extent.out[d];
    const bool used = d >= 3 - s.dims;
    const NearestIndex source(extent.in[d], extent.out[d], s, used ? d : 2);
    for (int64_t i = 0; i < extent.out[d]; ++i) op.index[d].push_back(used ? source(i) : 0);
  }
  op.in = ref(x);
  op.out = ref(*out);
  emit(std::move(op), "interpolate", "copy", {&x}, *out);
}

}  // namespace qk::plan
