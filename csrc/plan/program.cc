// From steps to operations, for one set of input shapes: where every value lies, what has to be
// copied in between, and which buffers share memory.
#include "csrc/plan/program.h"

#include <algorithm>

#include "csrc/plan/builder.h"
#include "csrc/plan/kernel_names.h"
#include "csrc/plan/layouts.h"

namespace qk::plan {
namespace {

constexpr int64_t kMacsPerNs = 200, kBytesPerNs = 48;  // of one thread

std::string description(const View& view) {
  return std::string(dtype_name(view.dtype)) + " " + text(view.size);
}

View unplaced(DType dtype, const Sizes& size) {
  View view;
  view.dtype = dtype;
  view.size = size;
  return view;
}

// Tells every product which weights the one after it reads first: a hint, so that a slice of the
// batch may take another way.
void announce_weights(int64_t threads, std::vector<Operation>* operations) {
  NextWeights next;
  for (auto op = operations->rbegin(); op != operations->rend(); ++op) {
    if (auto* conv = std::get_if<ConvOp>(&*op)) {
      conv->args.next = next;
      const NextWeights first = conv_first_weights(conv->args, threads);
      if (first.bytes > 0) next = first;
    } else if (auto* linear = std::get_if<LinearOp>(&*op)) {
      linear->args.next = next;
      next = first_weights(linear->args.matrix);
    }
  }
}

}  // namespace

ConvExtent extent_of(const View& in, const View& out) {
  ConvExtent extent;
  extent.batch = in.size[0];
  const int dims = in.rank() - 2;
  for (int i = 0; i < dims; ++i) {
    extent.in[kConvDims - dims + i] = in.size[2 + i];
    extent.out[kConvDims - dims + i] = out.size[2 + i];
  }
  return extent;
}

Error Builder::build(const std::vector<InputLayout>& inputs) {
  std::vector<Sizes> sizes;
  for (const InputLayout& input : inputs) sizes.push_back(input.size);
  const Error error = infer_shapes(model_, sizes, &shapes_);
  if (!error.ok()) return error;
  views_.resize(model_.values.size());
  find_readers();
  find_parts_of_cats();
  for (size_t i = 0; i < inputs.size(); ++i) place_input(static_cast<int>(i), inputs[i]);
  for (step_index_ = 0; step_index_ < static_cast<int>(model_.steps.size()); ++step_index_) {
    lower(model_.steps[step_index_]);
  }
  step_index_ = -1;
  const std::vector<View> layouts = module_layouts(model_, shapes_, inputs);
  for (size_t i = 0; i < model_.outputs.size(); ++i) {
    place_output(static_cast<int>(i), layouts[model_.outputs[i]]);
  }
  const int64_t batch = inputs.empty() || inputs[0].size.rank == 0 ? 1 : inputs[0].size[0];
  for (const OperationInfo& info : program_.info) {
    program_.work_ns += info.macs / kMacsPerNs + info.bytes / kBytesPerNs;
  }
  announce_weights(parallel_.threads, &program_.operations);
  place(parallel_, batch, cache_, static_cast<int>(inputs.size()), &draft_, &program_);
  return {};
}

int Builder::new_buffer(Home home, int64_t bytes, int index, const uint8_t* data) {
  draft_.buffers.push_back({home, bytes, index, data});
  return static_cast<int>(draft_.buffers.size()) - 1;
}

void Builder::place_input(int i, const InputLayout& layout) {
  const int value = model_.inputs[i].value;
  View view = unplaced(model_.values[value].dtype, layout.size);
  std::copy(layout.stride, layout.stride + kMaxRank, view.stride);
  view.buffer = new_buffer(Home::kInput, 0, i);
  views_[value] = view;
}

View Builder::output_view(const Step& step) const {
  return unplaced(model_.values[step.output].dtype, shapes_.values[step.output]);
}

bool Builder::fills_buffer(const View& view) const {
  const Buffer& buffer = draft_.buffers[view.buffer];
  return buffer.home == Home::kArena && view.offset == 0 && is_dense(view) &&
         buffer.bytes == bytes_of(view);
}

Ref Builder::ref(const View& view) {
  const int64_t image = view.rank() > 0 ? view.stride[0] * dtype_bytes(view.dtype) : 0;
  return {view.buffer, view.offset, image};
}

void Builder::touch(int buffer) {
  const auto now = static_cast<int>(program_.operations.size());
  draft_.buffers[buffer].first = std::min(draft_.buffers[buffer].first, now);
  draft_.buffers[buffer].last = std::max(draft_.buffers[buffer].last, now);
}

void Builder::emit(Operation operation, const std::string& kind, const std::string& kernel,
                   std::initializer_list<const View*> reads, const View& write, const Cost& cost) {
  OperationInfo info;
  info.step = step_index_;
  info.kind = kind;
  info.kernel = kernel;
  info.macs = cost.macs;
  info.workspace = cost.workspace;
  info.bytes = cost.weights + bytes_of(write);
  info.output = description(write);
  info.output_offset = write.buffer;  // resolved at the end
  for (const View* view : reads) {
    info.inputs.push_back(description(*view));
    info.bytes += bytes_of(*view);
  }
  for_each_ref(operation, [this](Ref& r) {
    if (r.base >= 0) touch(r.base);
  });
  std::vector<View>& views = draft_.views.emplace_back();
  for (const View* view : reads) views.push_back(*view);
  views.push_back(write);
  draft_.weights.push_back(cost.weights);
  program_.operations.push_back(std::move(operation));
  program_.info.push_back(std::move(info));
}

void Builder::may_overwrite(const View& from, const View& to,
                            std::initializer_list<const View*> others, int64_t least) {
  if (!same_strides(from, to) || dtype_bytes(from.dtype) != dtype_bytes(to.dtype) ||
      !fills_buffer(from)) {
    return;
  }
  for (const View* other : others) {
    if (other->buffer == from.buffer &&
        !(other->offset == from.offset && same_strides(*other, from))) {
      return;
    }
  }
  draft_.overwrites.push_back(
      {static_cast<int>(program_.operations.size()), from.buffer, to.buffer, least});
}

void Builder::emit_move(const View& from, const View& to, const uint8_t* table, const char* kind) {
  if (to.size.elements() == 0) return;
  MoveOp op;
  op.args.element = dtype_bytes(to.dtype);
  op.args.table = table;
  op.args.layout = walk<2>({&to, &from});
  op.in = ref(from);
  op.out = ref(to);
  emit(op, kind, table != nullptr ? lookup_kernel_name() : "copy", {&from}, to);
}

View Builder::with_strides(const View& view, View wanted) {
  if (same_strides(view, wanted)) return view;
  wanted.dtype = view.dtype;
  wanted.offset = 0;
  allocate(&wanted);
  emit_move(view, wanted, nullptr, "copy");
  return wanted;
}

View Builder::as_channels_last(const View& view) {
  View wanted = view;
  set_channels_last(&wanted);
  return with_strides(view, wanted);
}

View Builder::as_pixels(const View& view, int64_t* stride) {
  if (pixel_stride(view, stride)) return view;
  *stride = view.size[1];
  return as_channels_last(view);
}

View Builder::as_contiguous(const View& view) {
  View wanted = view;
  set_contiguous(&wanted);
  return with_strides(view, wanted);
}

View Builder::as_dense(const View& view) {
  View wanted = view;
  set_order_of(&wanted, view);
  return with_strides(view, wanted);
}

void Builder::find_readers() {
  const size_t count = model_.values.size();
  wants_channels_last_.assign(count, false);
  writer_.assign(count, -1);
  reader_.assign(count, -1);
  readers_.assign(count, 0);
  for (const int value : model_.outputs) ++readers_[value];
  for (size_t i = 0; i < model_.steps.size(); ++i) {
    const Step& step = model_.steps[i];
    writer_[step.output] = static_cast<int>(i);
    for (const int value : step.inputs) {
      reader_[value] = static_cast<int>(i);
      ++readers_[value];
    }
    switch (step.kind) {
      case StepKind::kConv:
      case StepKind::kMaxPool:
      case StepKind::kAvgPool:
      case StepKind::kAdaptiveAvgPool:
      case StepKind::kInterpolate:
        for (const int value : step.inputs) wants_channels_last_[value] = true;
        break;
      default:
        break;
    }
  }
  // What is cut out or joined is asked for what its readers want.
  for (auto step = model_.steps.rbegin(); step != model_.steps.rend(); ++step) {
    if (step->kind != StepKind::kSlice && step->kind != StepKind::kCat) continue;
    if (!wants_channels_last_[step->output]) continue;
    for (const int value : step->inputs) wants_channels_last_[value] = true;
  }
}

const PackedConvHeader* Builder::packed_conv(int index) const {
  const PackedConvHeader* header = nullptr;
  view_packed_conv(packed_[index].data(), packed_[index].bytes(), &header);
  return header;
}

void Builder::lower(const Step& step) {
  View& out = views_[step.output];
  if (out.buffer < 0) out = output_view(step);  // a cat may have a place already
  switch (step.kind) {
    case StepKind::kConstant: {
      const int tensor = step.as<ConstantStep>().tensor;
      set_contiguous(&out);
      out.buffer = new_buffer(Home::kConstant, 0, 0, constants_[tensor]);
      break;
    }
    case StepKind::kQuantize:
      lower_quantize(step, &out);
      break;
    case StepKind::kDequantize:
      lower_dequantize(step, &out);
      break;
    case StepKind::kLinear:
      lower_linear(step);
      break;
    case StepKind::kConv:
      lower_conv(step);
      break;
    case StepKind::kAdd:
    case StepKind::kMul:
      lower_binary(step, &out);
      break;
    case StepKind::kCat:
      lower_cat(step, &out);
      break;
    case StepKind::kLookup:
      lower_lookup(step, &out);
      break;
    case StepKind::kMaxPool:
      lower_max_pool(step, &out);
      break;
    case StepKind::kAvgPool:
    case StepKind::kAdaptiveAvgPool:
      lower_avg_pool(step, &out);
      break;
    case StepKind::kInterpolate:
      lower_interpolate(step, &out);
      break;
    case StepKind::kPad:
      lower_pad(step, &out);
      break;
    case StepKind::kReshape:
      lower_reshape(step, &out);
      break;
    case StepKind::kPermute:
      lower_permute(step, &out);
      break;
    case StepKind::kSlice:
      lower_slice(step, &out);
      break;
    case StepKind::kExpand:
      lower_expand(step, &out);
      break;
  }
}

void Builder::place_output(int i, const View& layout) {
  const View& view = views_[model_.outputs[i]];
  View to = view;
  set_like(&to, layout);
  if (!fills_buffer(view) || !same_strides(view, to)) {
    to.offset = 0;
    to.buffer = new_buffer(Home::kOutput, bytes_of(view), i);
    emit_move(view, to, nullptr, "copy");
  } else {
    Buffer& buffer = draft_.buffers[view.buffer];
    buffer.home = Home::kOutput;
    buffer.index = i;
  }
  OutputSpec spec;
  spec.dtype = to.dtype;
  spec.size = to.size;
  std::copy(to.stride, to.stride + kMaxRank, spec.stride);
  spec.bytes = bytes_of(to);
  program_.outputs.push_back(spec);
}

Error make_program(const Model& model, const std::vector<Block>& packed,
                   const std::vector<const uint8_t*>& constants,
                   const std::vector<InputLayout>& inputs, int64_t cache, const Parallel& parallel,
                   Program* program) {
  return Builder(model, packed, constants, cache, parallel, program).build(inputs);
}

}  // namespace qk::plan
