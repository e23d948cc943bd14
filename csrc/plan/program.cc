// From steps to operations, for one set of input shapes: where every value lies, what has to be
// copied in between, and which buffers share memory.
#include "csrc/plan/program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "csrc/plan/kernel_names.h"
#include "csrc/plan/operations.h"
#include "csrc/plan/placement.h"

namespace qk::plan {
namespace {

// Of one operation, for its description: multiply-adds, and bytes.
struct Cost {
  int64_t macs = 0, weights = 0, workspace = 0;
};

FloatType float_type(DType dtype) {
  return dtype == DType::kF32    ? FloatType::kFloat32
         : dtype == DType::kBF16 ? FloatType::kBFloat16
                                 : FloatType::kFloat16;
}

bool is_signed(const View& view) { return view.dtype == DType::kS8; }

int64_t bytes_of(const View& view) { return view.size.elements() * dtype_bytes(view.dtype); }

bool is_identity(const uint8_t* table) {
  for (int i = 0; i < 256; ++i) {
    if (table[i] != i) return false;
  }
  return true;
}

std::string description(const View& view) {
  return std::string(dtype_name(view.dtype)) + " " + text(view.size);
}

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

class Builder {
 public:
  Builder(const Model& model, const std::vector<Block>& packed,
          const std::vector<const uint8_t*>& constants, int64_t cache, const Parallel& parallel,
          Program* program)
      : model_(model),
        packed_(packed),
        constants_(constants),
        cache_(cache),
        parallel_(parallel),
        program_(*program) {}

  Error build(const std::vector<InputLayout>& inputs) {
    std::vector<Sizes> sizes;
    for (const InputLayout& input : inputs) sizes.push_back(input.size);
    const Error error = infer_shapes(model_, sizes, &shapes_);
    if (!error.ok()) return error;
    views_.resize(model_.values.size());
    find_readers();
    for (size_t i = 0; i < inputs.size(); ++i) place_input(static_cast<int>(i), inputs[i]);
    for (step_index_ = 0; step_index_ < static_cast<int>(model_.steps.size()); ++step_index_) {
      lower(model_.steps[step_index_]);
    }
    step_index_ = -1;
    for (size_t i = 0; i < model_.outputs.size(); ++i) place_output(static_cast<int>(i));
    const int64_t batch = inputs.empty() || inputs[0].size.rank == 0 ? 1 : inputs[0].size[0];
    place(parallel_, batch, cache_, static_cast<int>(inputs.size()), &draft_, &program_);
    return {};
  }

 private:
  // ---- buffers and views

  int new_buffer(Home home, int64_t bytes, int index = 0, const uint8_t* data = nullptr) {
    draft_.buffers.push_back({home, bytes, index, data});
    return static_cast<int>(draft_.buffers.size()) - 1;
  }

  View view_of(DType dtype, const Sizes& size) const {
    View view;
    view.dtype = dtype;
    view.size = size;
    return view;
  }

  void place_input(int i, const InputLayout& layout) {
    const int value = model_.inputs[i].value;
    View view = view_of(model_.values[value].dtype, layout.size);
    std::copy(layout.stride, layout.stride + kMaxRank, view.stride);
    view.buffer = new_buffer(Home::kInput, 0, i);
    views_[value] = view;
  }

  // The output of the current step, without memory yet.
  View output_view(const Step& step) const {
    return view_of(model_.values[step.output].dtype, shapes_.values[step.output]);
  }

  void allocate(View* view) { view->buffer = new_buffer(Home::kArena, bytes_of(*view)); }

  // A view that fills its buffer: dense, from the start.
  bool fills_buffer(const View& view) const {
    const Buffer& buffer = draft_.buffers[view.buffer];
    return buffer.home == Home::kArena && view.offset == 0 && is_dense(view) &&
           buffer.bytes == bytes_of(view);
  }

  static Ref ref(const View& view) {
    const int64_t image = view.rank() > 0 ? view.stride[0] * dtype_bytes(view.dtype) : 0;
    return {view.buffer, view.offset, image};
  }

  void touch(int buffer) {
    const auto now = static_cast<int>(program_.operations.size());
    draft_.buffers[buffer].first = std::min(draft_.buffers[buffer].first, now);
    draft_.buffers[buffer].last = std::max(draft_.buffers[buffer].last, now);
  }

  void emit(Operation operation, const std::string& kind, const std::string& kernel,
            std::initializer_list<const View*> reads, const View& write, const Cost& cost = {}) {
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

  // The operation emitted next may write `to` over `from`, if nothing reads `from` later and it
  // has `least` bytes.
  void may_overwrite(const View& from, const View& to, std::initializer_list<const View*> others,
                     int64_t least = 0) {
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

  void emit_move(const View& from, const View& to, const uint8_t* table, const char* kind) {
    if (to.size.elements() == 0) return;
    MoveOp op;
    op.args.element = dtype_bytes(to.dtype);
    op.args.table = table;
    op.args.layout = walk<2>({&to, &from});
    op.in = ref(from);
    op.out = ref(to);
    emit(op, kind, table != nullptr ? lookup_kernel_name() : "copy", {&from}, to);
  }

  // `view` itself, or a copy with the strides of `wanted`.
  View with_strides(const View& view, View wanted) {
    if (same_strides(view, wanted)) return view;
    wanted.offset = 0;
    allocate(&wanted);
    emit_move(view, wanted, nullptr, "copy");
    return wanted;
  }
  View as_channels_last(const View& view) {
    View wanted = view;
    set_channels_last(&wanted);
    return with_strides(view, wanted);
  }
  View as_contiguous(const View& view) {
    View wanted = view;
    set_contiguous(&wanted);
    return with_strides(view, wanted);
  }
  View as_dense(const View& view) {
    View wanted = view;
    set_order_of(&wanted, view);
    return with_strides(view, wanted);
  }

  const View& input(const Step& step, int i) const { return views_[step.inputs[i]]; }

  // ---- what reads a value

  void find_readers() {
    wants_channels_last_.assign(model_.values.size(), false);
    for (const Step& step : model_.steps) {
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
  }

  // ---- steps

  void lower(const Step& step) {
    View& out = views_[step.output];
    out = output_view(step);
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
        lower_linear(step, &out);
        break;
      case StepKind::kConv:
        lower_conv(step, &out);
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
        if (!reshape_view(input(step, 0), out.size, &out)) {
          reshape_view(as_contiguous(input(step, 0)), shapes_.values[step.output], &out);
        }
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

  GridLayout grid_layout(const QuantizeStep& s, const View& out, const View& in) const {
    GridLayout grid;
    grid.strided = walk<2>({&out, &in}, s.axis, &grid.channel_dim);
    grid.scale = reinterpret_cast<const float*>(constants_[s.scale]);
    grid.zero_point = reinterpret_cast<const int32_t*>(constants_[s.zero_point]);
    return grid;
  }

  // Whether the channels are planes of contiguous pixels.
  static bool is_planar(const View& view) {
    int64_t stride = 1;
    for (int d = view.rank() - 1; d >= 2; --d) {
      if (view.size[d] != 1 && view.stride[d] != stride) return false;
      stride *= view.size[d];
    }
    return true;
  }

  void lower_image(const Step& step, const View& x, View* out) {
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

  void lower_quantize(const Step& step, View* out) {
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

  void lower_dequantize(const Step& step, View* out) {
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

  // The stride between rows of [..., K], if there is one and a row is dense.
  static bool row_stride(const View& view, int64_t* stride) {
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
  View as_rows(const View& view, int64_t* stride) {
    if (row_stride(view, stride)) return view;
    const View rows = as_contiguous(view);
    row_stride(rows, stride);
    return rows;
  }

  void lower_linear(const Step& step, View* out) {
    const auto& s = step.as<WeightedStep>();
    set_contiguous(out);
    allocate(out);
    if (out->size.elements() == 0) return;
    const Block& packed = packed_[step_index_];
    LinearOp op;
    op.args = {};
    view_packed(packed.data(), packed.bytes(), &op.args.matrix);
    op.args.rows = out->size.elements() / s.conv.out_channels;
    const View x = as_rows(input(step, 0), &op.args.input_row_stride);
    op.input = ref(x);
    op.out = ref(*out);
    op.residual = {-1, 0};
    const Cost cost{out->size.elements() * s.conv.in_channels, packed.bytes(), 0};
    const char* kernel = igemm_kernel_name(op.args.matrix.header->isa);
    if (!s.has_residual) {
      emit(op, "linear", kernel, {&x}, *out, cost);
      return;
    }
    const View residual = as_rows(input(step, 1), &op.args.residual_row_stride);
    op.args.residual_signed = is_signed(residual);
    op.residual = ref(residual);
    emit(op, "linear", kernel, {&x, &residual}, *out, cost);
  }

  static ConvExtent extent_of(const View& in, const View& out) {
    ConvExtent extent;
    extent.batch = in.size[0];
    const int dims = in.rank() - 2;
    for (int i = 0; i < dims; ++i) {
      extent.in[kConvDims - dims + i] = in.size[2 + i];
      extent.out[kConvDims - dims + i] = out.size[2 + i];
    }
    return extent;
  }

  void lower_conv(const Step& step, View* out) {
    const auto& s = step.as<WeightedStep>();
    set_channels_last(out);
    allocate(out);
    if (out->size.elements() == 0) return;
    const Block& packed = packed_[step_index_];
    const View x = as_channels_last(input(step, 0));
    ConvOp op;
    view_packed_conv(packed.data(), packed.bytes(), &op.args.packed);
    op.args.extent = extent_of(x, *out);
    Cost cost{out->size.elements() * s.conv.in_per_group() * s.conv.kernel_size(), packed.bytes(),
              conv_workspace_bytes(op.args, parallel_)};
    if (s.conv.transposed) {
      cost.macs = x.size.elements() * s.conv.out_per_group() * s.conv.kernel_size();
    }
    op.input = ref(x);
    op.out = ref(*out);
    op.residual = {-1, 0};
    const PackedConvHeader& header = *op.args.packed;
    const char* kernel = header.kind == ConvKind::kDepthwise ? depthwise_kernel_name(header.isa)
                                                             : igemm_kernel_name(header.isa);
    op.workspace = {new_buffer(Home::kArena, cost.workspace), 0};
    if (!s.has_residual) {
      emit(op, "conv", kernel, {&x}, *out, cost);
      return;
    }
    const View residual = as_channels_last(input(step, 1));
    op.args.residual_signed = is_signed(residual);
    op.residual = ref(residual);
    if (residual.buffer != x.buffer && conv_adds_in_place(header)) {
      may_overwrite(residual, *out, {&x}, cache_ / 4);
    }
    emit(op, "conv", kernel, {&x, &residual}, *out, cost);
  }

  // `view` broadcast to `size`.
  static View broadcast(const View& view, const Sizes& size) {
    View wide = view;
    wide.size = size;
    const int missing = size.rank - view.rank();
    for (int d = 0; d < size.rank; ++d) {
      const bool repeats = d < missing || (view.size[d - missing] == 1 && size[d] != 1);
      wide.stride[d] = repeats ? 0 : view.stride[d - missing];
    }
    return wide;
  }
  // Whether the kernel can read operand k in the walk's order.
  static bool readable(const StridedLayout<3>& layout, int k) {
    const int64_t inner = layout.stride[k][layout.dims - 1];
    return inner == 1 || inner == 0;
  }

  void lower_binary(const Step& step, View* out) {
    const auto& s = step.as<BinaryStep>();
    View a = broadcast(input(step, 0), out->size), b = broadcast(input(step, 1), out->size);
    const bool a_full = input(step, 0).size == out->size, b_full = input(step, 1).size == out->size;
    if (a_full) {
      set_order_of(out, a);
    } else if (b_full) {
      set_order_of(out, b);
    } else {
      set_contiguous(out);
    }
    allocate(out);
    if (out->size.elements() == 0) return;
    StridedLayout<3> layout = walk<3>({out, &a, &b});
    for (int k = 1; k <= 2; ++k) {
      if (readable(layout, k)) continue;
      View& operand = k == 1 ? a : b;
      operand = with_strides(operand, *out);
      layout = walk<3>({out, &a, &b});
    }
    PairOp op;
    op.args = {step.kind == StepKind::kAdd ? BinaryOp::kAdd : BinaryOp::kMul,
               nullptr,
               nullptr,
               nullptr,
               {.a_signed = is_signed(a),
                .b_signed = is_signed(b),
                .out_signed = is_signed(*out),
                .a_scale = s.a.scale,
                .b_scale = s.b.scale,
                .out_scale = s.output.scale,
                .a_zero_point = s.a.zero_point,
                .b_zero_point = s.b.zero_point,
                .out_zero_point = s.output.zero_point,
                .qmin = s.output.qmin,
                .qmax = s.output.qmax},
               layout};
    op.a = ref(a);
    op.b = ref(b);
    op.out = ref(*out);
    may_overwrite(a, *out, {&b});
    may_overwrite(b, *out, {&a});
    emit(op, step_kind_name(step.kind), binary_kernel_name(step.kind == StepKind::kMul), {&a, &b},
         *out);
  }

  // The part of `view` that starts at `first` in dimension `dim` and has `count` elements there.
  static View narrow(View view, int dim, int64_t first, int64_t count, int64_t step = 1) {
    view.offset += first * view.stride[dim] * dtype_bytes(view.dtype);
    view.size[dim] = count;
    view.stride[dim] *= step;
    return view;
  }

  void lower_cat(const Step& step, View* out) {
    const auto& s = step.as<CatStep>();
    bool channels_last = out->rank() >= 3;
    for (size_t i = 0; i < step.inputs.size(); ++i) {
      const View& x = input(step, static_cast<int>(i));
      channels_last = channels_last && (x.size.elements() == 0 || is_channels_last(x));
    }
    channels_last ? set_channels_last(out) : set_contiguous(out);
    allocate(out);
    int64_t first = 0;
    for (size_t i = 0; i < step.inputs.size(); ++i) {
      const View& x = input(step, static_cast<int>(i));
      const uint8_t* table = constants_[s.tables] + 256 * i;
      emit_move(x, narrow(*out, s.dim, first, x.size[s.dim]), is_identity(table) ? nullptr : table,
                "cat");
      first += x.size[s.dim];
    }
  }

  void lower_lookup(const Step& step, View* out) {
    const View& x = input(step, 0);
    set_order_of(out, x);
    allocate(out);
    may_overwrite(x, *out, {});
    emit_move(x, *out, constants_[step.as<LookupStep>().table], "lookup");
  }

  static PoolGeometry geometry_of(const PoolStep& s, const View& in, const View& out,
                                  bool adaptive) {
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

  void lower_max_pool(const Step& step, View* out) {
    const View x = as_channels_last(input(step, 0));
    set_channels_last(out);
    allocate(out);
    if (out->size.elements() == 0) return;
    MaxPoolOp op;
    op.args = {nullptr, nullptr, is_signed(x), geometry_of(step.as<PoolStep>(), x, *out, false)};
    op.q = ref(x);
    op.out = ref(*out);
    emit(op, "max_pool", max_pool_kernel_name(), {&x}, *out);
  }

  void lower_avg_pool(const Step& step, View* out) {
    const auto& s = step.as<PoolStep>();
    const View x = as_channels_last(input(step, 0));
    set_channels_last(out);
    allocate(out);
    if (out->size.elements() == 0) return;
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
               .qmax = s.output.qmax};
    op.q = ref(x);
    op.out = ref(*out);
    emit(op, step_kind_name(step.kind), avg_pool_kernel_name(), {&x}, *out);
  }

  void lower_interpolate(const Step& step, View* out) {
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

  void lower_pad(const Step& step, View* out) {
    const auto& s = step.as<PadStep>();
    View from = input(step, 0), to = *out;
    is_channels_last(from) ? set_channels_last(&to) : set_contiguous(&to);
    allocate(&to);
    *out = to;
    if (out->size.elements() == 0) return;
    FillOp fill;
    fill.value = static_cast<int>(s.value);
    fill.bytes = bytes_of(*out);
    fill.out = ref(*out);
    emit(fill, "pad", "fill", {}, *out);
    for (int i = 0; i < s.pairs; ++i) {
      const int d = from.rank() - 1 - i;
      const int64_t before = shapes_.scalars[s.amounts[2 * i]];
      const int64_t after = shapes_.scalars[s.amounts[2 * i + 1]];
      const int64_t cropped = before < 0 ? -before : 0;
      const int64_t count = from.size[d] - cropped - (after < 0 ? -after : 0);
      from = narrow(from, d, cropped, count);
      to = narrow(to, d, before > 0 ? before : 0, count);
    }
    emit_move(from, to, nullptr, "pad");
  }

  void lower_permute(const Step& step, View* out) {
    const View& x = input(step, 0);
    const auto& s = step.as<ShapeStep>();
    out->buffer = x.buffer;
    out->offset = x.offset;
    for (int d = 0; d < s.rank; ++d) out->stride[d] = x.stride[s.items[d]];
  }

  void lower_slice(const Step& step, View* out) {
    const View& x = input(step, 0);
    const auto& s = step.as<SliceStep>();
    const Slice slice =
        slice_of(shapes_.scalars[s.start], shapes_.scalars[s.stop], s.step, x.size[s.dim]);
    *out = narrow(x, s.dim, slice.count > 0 ? slice.first : 0, slice.count, s.step);
  }

  void lower_expand(const Step& step, View* out) { *out = broadcast(input(step, 0), out->size); }

  // ---- outputs and memory

  void place_output(int i) {
    View view = views_[model_.outputs[i]];
    const bool taken = !fills_buffer(view);
    if (taken) {
      View to = view;
      set_order_of(&to, view);
      to.offset = 0;
      to.buffer = new_buffer(Home::kOutput, bytes_of(view), i);
      emit_move(view, to, nullptr, "copy");
      view = to;
    } else {
      Buffer& buffer = draft_.buffers[view.buffer];
      buffer.home = Home::kOutput;
      buffer.index = i;
    }
    OutputSpec spec;
    spec.dtype = view.dtype;
    spec.size = view.size;
    std::copy(view.stride, view.stride + kMaxRank, spec.stride);
    spec.bytes = bytes_of(view);
    program_.outputs.push_back(spec);
  }

  const Model& model_;
  const std::vector<Block>& packed_;
  const std::vector<const uint8_t*>& constants_;
  const int64_t cache_;
  const Parallel& parallel_;
  Program& program_;
  Shapes shapes_;
  std::vector<View> views_;  // by value
  std::vector<bool> wants_channels_last_;
  Draft draft_;
  int step_index_ = 0;
};

}  // namespace

Error make_program(const Model& model, const std::vector<Block>& packed,
                   const std::vector<const uint8_t*>& constants,
                   const std::vector<InputLayout>& inputs, int64_t cache, const Parallel& parallel,
                   Program* program) {
  return Builder(model, packed, constants, cache, parallel, program).build(inputs);
}

}  // namespace qk::plan
