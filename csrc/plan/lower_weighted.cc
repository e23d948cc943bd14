// linear and convolution.
#include "csrc/plan/builder.h"
#include "csrc/plan/kernel_names.h"

namespace qk::plan {
namespace {

// The stride between rows of [..., K], if there is one and a row is dense.
bool row_stride(const View& view, int64_t* stride) {
  const int last = view.rank() - 1;
  if (view.size[last] > 1 && view.stride[last] != 1) return false;
  *stride = 0;
  int64_t expected = -1;
  for (int d = last - 1; d >= 0; --d) {
    if (view.size[d] == 1) continue;
    if (expected < 0) {
      *stride = view.stride[d];
    } else if (view.stride[d] != expected) {
      return false;
    }
    expected = view.stride[d] * view.size[d];
  }
  return true;
}

// What an operation does, for its description.
std::string kind_of(const char* layer, bool quantizes, const DequantizedOutput& floats) {
  return std::string(quantizes ? "quantize + " : "") + layer +
         (floats.scale != nullptr ? " + dequantize" : "");
}

}  // namespace

View Builder::as_rows(const View& view, int64_t* stride) {
  if (row_stride(view, stride)) return view;
  const View rows = as_contiguous(view);
  row_stride(rows, stride);
  return rows;
}

void Builder::lower_linear(const Step& step) {
  const auto& s = step.as<WeightedStep>();
  LinearOp op;
  op.args = {};
  View* out = stored(step, &op.args.floats);
  set_contiguous(out);
  allocate(out);
  if (out->size.elements() == 0) return;
  const Block& packed = packed_[step_index_];
  view_packed(packed.data(), packed.bytes(), &op.args.matrix);
  op.args.rows = out->size.elements() / s.conv.out_channels;
  const View x = as_rows(input(step, 0), &op.args.input_row_stride);
  op.input = ref(x);
  op.out = ref(*out);
  op.residual = op.workspace = {-1, 0};
  const Cost cost{out->size.elements() * s.conv.in_channels, packed.bytes(),
                  linear_workspace_bytes(op.args, parallel_)};
  if (cost.workspace > 0) op.workspace = {new_buffer(Home::kArena, cost.workspace), 0};
  const std::string kind = kind_of("linear", false, op.args.floats);
  const char* kernel = igemm_kernel_name(op.args.matrix.header->isa);
  if (!s.has_residual) {
    emit(op, kind, kernel, {&x}, *out, cost);
    return;
  }
  const View residual = as_rows(input(step, 1), &op.args.residual_row_stride);
  op.args.residual_signed = is_signed(residual);
  op.residual = ref(residual);
  emit(op, kind, kernel, {&x, &residual}, *out, cost);
}

void Builder::lower_conv(const Step& step) {
  const auto& s = step.as<WeightedStep>();
  ConvOp op;
  View* out = stored(step, &op.args.dequantized);
  allocate_pixels(step, out);
  if (out->size.elements() == 0) return;
  const Step* quantize = quantized_by(step);
  op.args.packed = packed_conv(step_index_);
  const View x = quantize != nullptr ? input(*quantize, 0)
                 : conv_reads_slices(*op.args.packed)
                     ? as_pixels(input(step, 0), &op.args.in_pixel_stride)
                     : as_channels_last(input(step, 0));
  op.args.extent = extent_of(x, *out);
  op.args.out_pixel_stride = out->stride[out->rank() - 1];
  Cost cost{out->size.elements() * s.conv.in_per_group() * s.conv.kernel_size(),
            conv_weight_bytes(op.args, parallel_.threads),
            conv_workspace_bytes(op.args, parallel_)};
  if (s.conv.transposed) {
    cost.macs = x.size.elements() * s.conv.out_per_group() * s.conv.kernel_size();
  }
  op.input = op.floats = op.residual = {-1, 0};
  if (quantize != nullptr) op.args.floats = images_of(*quantize);
  (quantize != nullptr ? op.floats : op.input) = ref(x);
  op.out = ref(*out);
  const std::string kind = kind_of("conv", quantize != nullptr, op.args.dequantized);
  const PackedConvHeader& header = *op.args.packed;
  const char* kernel = conv_kernel_name(op.args, parallel_.threads);
  op.workspace = {new_buffer(Home::kArena, cost.workspace), 0};
  if (s.has_residual) {
    const View residual = as_channels_last(input(step, 1));
    op.args.residual_signed = is_signed(residual);
    op.residual = ref(residual);
    if (residual.buffer != x.buffer && conv_adds_in_place(header)) {
      may_overwrite(residual, *out, {&x}, cache_ / 4);
    }
    emit(op, kind, kernel, {&x, &residual}, *out, cost);
  } else {
    emit(op, kind, kernel, {&x}, *out, cost);
  }
  mention_cat(step);
}

}  // namespace qk::plan
