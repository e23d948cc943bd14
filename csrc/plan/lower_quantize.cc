// quantize and dequantize, and which layers do that themselves: a convolution quantizes the image
// that it pads, and a layer whose codes only a dequantize step reads writes floats.
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

// Whether the channels of contiguous pixels are innermost.
bool is_interleaved(const View& view) { return is_channels_last(narrow(view, 0, 0, 1)); }

}  // namespace

GridLayout Builder::grid_layout(const QuantizeStep& s, const View& out, const View& in) const {
  GridLayout grid;
  grid.strided = walk<2>({&out, &in}, s.axis, &grid.channel_dim);
  grid.scale = reinterpret_cast<const float*>(constants_[s.scale]);
  grid.zero_point = reinterpret_cast<const int32_t*>(constants_[s.zero_point]);
  return grid;
}

bool Builder::is_image(const Step& step) const {
  const View& x = input(step, 0);
  const auto& s = step.as<QuantizeStep>();
  if (x.rank() < 3 || x.size.elements() == 0 || (s.axis != -1 && s.axis != 1)) return false;
  return is_interleaved(x) ? s.axis == -1 || x.size[1] == 1
                           : is_planar(x) && x.size[1] <= kMaxImageChannels;
}

FloatImages Builder::images_of(const Step& step) const {
  const View& x = input(step, 0);
  const auto& s = step.as<QuantizeStep>();
  FloatImages images;
  images.x_type = float_type(x.dtype);
  images.interleaved = is_interleaved(x);
  images.channels = x.size[1];
  images.batch_stride = x.stride[0];
  images.channel_stride = x.stride[1];
  images.scale = reinterpret_cast<const float*>(constants_[s.scale]);
  images.zero_point = reinterpret_cast<const int32_t*>(constants_[s.zero_point]);
  images.per_channel = s.axis == 1;
  images.q_signed = model_.values[step.output].dtype == DType::kS8;
  images.qmin = s.qmin;
  images.qmax = s.qmax;
  return images;
}

const Step* Builder::quantized_by(const Step& conv) const {
  const int value = conv.inputs[0], from = writer_[value];
  if (from < 0 || readers_[value] > 1 || model_.steps[from].kind != StepKind::kQuantize) {
    return nullptr;
  }
  const Step& quantize = model_.steps[from];
  return is_image(quantize) && conv_pads_image(*packed_conv(writer_[conv.output])) ? &quantize
                                                                                   : nullptr;
}

void Builder::lower_quantize(const Step& step, View* out) {
  const auto& s = step.as<QuantizeStep>();
  const int reader = reader_[step.output];
  if (reader >= 0 && model_.steps[reader].kind == StepKind::kConv &&
      quantized_by(model_.steps[reader]) == &step) {
    return;
  }
  if (wants_channels_last_[step.output] && is_image(step) && !is_channels_last(input(step, 0))) {
    const View& x = input(step, 0);
    set_channels_last(out);
    allocate(out);
    ImageOp op;
    op.args = {images_of(step), nullptr, x.size[0], x.size.elements() / x.size[0] / x.size[1]};
    op.x = ref(x);
    op.q = ref(*out);
    emit(op, "quantize", quantize_kernel_name(op.args.images.x_type), {&x}, *out);
    return;
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

const Step* Builder::dequantized_by(const Step& step) const {
  const int reader = reader_[step.output];
  if (reader < 0 || readers_[step.output] > 1) return nullptr;
  const Step& dequantize = model_.steps[reader];
  if (dequantize.kind != StepKind::kDequantize || dequantize.as<QuantizeStep>().axis >= 0 ||
      !is_code(model_.values[step.output].dtype) ||
      model_.values[dequantize.output].dtype != DType::kF32) {
    return nullptr;
  }
  const bool can =
      step.kind == StepKind::kLinear ||
      (step.kind == StepKind::kConv && conv_dequantizes(*packed_conv(writer_[step.output])));
  return can ? &dequantize : nullptr;
}

View* Builder::stored(const Step& step, DequantizedOutput* floats) {
  const Step* dequantize = dequantized_by(step);
  if (dequantize == nullptr) return &views_[step.output];
  const auto& s = dequantize->as<QuantizeStep>();
  floats->scale = reinterpret_cast<const float*>(constants_[s.scale]);
  floats->zero_point = reinterpret_cast<const int32_t*>(constants_[s.zero_point]);
  View* out = &views_[dequantize->output];
  *out = output_view(*dequantize);
  floats->stream = bytes_of(*out) >= kStreamBytes;
  return out;
}

void Builder::lower_dequantize(const Step& step, View* out) {
  const auto& s = step.as<QuantizeStep>();
  const int writer = writer_[step.inputs[0]];
  if (writer >= 0 && dequantized_by(model_.steps[writer]) == &step) return;
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
