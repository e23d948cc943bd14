// quantize and dequantize.
#include "csrc/plan/builder.h"
#include "csrc/plan/kernel_names.h"

namespace qk::plan {
namespace {

FloatType float_type(DType dtype) {
  return dtype == DType::kF32    ? FloatType::kFloat32
         : dtype == DType::kBF16 ? FloatType::kBFloat16
                                 : FloatType::kFloat16;
}

// Whether the channels are planes of contiguous pixels.
bool is_planar(const View& view) {
  int64_t stride = 1;
  for (int d = view.rank() - 1; d >= 2; --d) {
    if (view.size[d] != 1 && view.stride[d] != stride) return false;
    stride *= view.size[d];
  }
  return true;
}

}  // namespace

GridLayout Builder::grid_layout(const QuantizeStep& s, const View& out, const View& in) const {
  GridLayout grid;
  grid.strided = walk<2>({&out, &in}, s.axis, &grid.channel_dim);
  grid.scale = reinterpret_cast<const float*>(constants_[s.scale]);
  grid.zero_point = reinterpret_cast<const int32_t*>(constants_[s.zero_point]);
  return grid;
}

void Builder::lower_image(const Step& step, const View& x, View* out) {
  const auto& s = step.as<QuantizeStep>();
  set_channels_last(out);
  allocate(out);
  ImageOp op;
  op.args = {.x = nullptr,
             .x_type = float_type(x.dtype),
             .q = nullptr,
             .q_signed = is_signed(*out),
             .qmin = s.qmin,
             .qmax = s.qmax,
             .batch = x.size[0],
             .channels = x.size[1],
             .pixels = x.size.elements() / x.size[0] / x.size[1],
             .batch_stride = x.stride[0],
             .channel_stride = x.stride[1],
             .scale = reinterpret_cast<const float*>(constants_[s.scale]),
             .zero_point = reinterpret_cast<const int32_t*>(constants_[s.zero_point]),
             .per_channel = s.axis == 1};
  op.x = ref(x);
  op.q = ref(*out);
  emit(op, "quantize", quantize_kernel_name(op.args.x_type), {&x}, *out);
}

void Builder::lower_quantize(const Step& step, View* out) {
  const auto& s = step.as<QuantizeStep>();
  const View& source = input(step, 0);
  if (wants_channels_last_[step.output] && !is_channels_last(source) && is_planar(source) &&
      source.size[1] <= kMaxImageChannels && (s.axis == -1 || s.axis == 1) &&
      source.size.elements() > 0) {
    return lower_image(step, source, out);
  }
  const View x = as_dense(input(step, 0));
  set_order_of(out, x);
  allocate(out);
  if (out->size.elements() > 0) {
    QuantizeOp op;
    op.args = {nullptr, float_type(x.dtype),    nullptr, is_signed(*out), s.qmin,
               s.qmax,  grid_layout(s, *out, x)};
    op.x = ref(x);
    op.q = ref(*out);
    emit(op, "quantize", quantize_kernel_name(op.args.x_type), {&x}, *out);
  }
  if (wants_channels_last_[step.output]) *out = as_channels_last(*out);
}

void Builder::lower_dequantize(const Step& step, View* out) {
  const auto& s = step.as<QuantizeStep>();
  const View q = as_dense(input(step, 0));
  set_order_of(out, q);
  allocate(out);
  if (out->size.elements() == 0) return;
  DequantizeOp op;
  op.args = {nullptr, is_signed(q) ? CodeType::kInt8 : CodeType::kUInt8, nullptr,
             float_type(out->dtype), grid_layout(s, *out, q)};
  op.q = ref(q);
  op.x = ref(*out);
  emit(op, "dequantize", dequantize_kernel_name(op.args.x_type), {&q}, *out);
}

}  // namespace qk::plan
