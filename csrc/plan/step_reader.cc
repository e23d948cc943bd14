#include "csrc/plan/step_reader.h"

#include <bit>
#include <cmath>

#include "csrc/base/numerics.h"

namespace qk::plan {
namespace {

constexpr int64_t kWindow = 65535;  // of strides, paddings, dilations and pool windows

class StepReader {
 public:
  StepReader(const Model& model, const std::vector<int64_t>& written_by, int64_t index,
             const int64_t* cells, int64_t count, Step* step)
      : model_(model),
        written_by_(written_by),
        index_(index),
        cells_(cells),
        count_(count),
        step_(*step) {}

  Error read(int inputs) {
    for (int i = 0; i < inputs; ++i) step_.inputs.push_back(read_operand());
    step_.output =
        static_cast<int>(integer("output", 0, static_cast<int64_t>(model_.values.size()) - 1));
    if (!error_.ok()) return error_;
    if (written_by_[step_.output] != kNever) {
      complain("writes a value a second time");
      return error_;
    }
    read_attributes();
    if (error_.ok() && next_ != count_) complain("has too many attributes");
    return error_;
  }

 private:
  template <typename... Parts>
  bool complain(const Parts&... parts) {
    if (error_.ok()) error_ = step_error(index_, step_, parts...);
    return false;
  }

  // The attribute cells of the current step. After a failure everything reads as zero.
  int64_t integer(const char* what, int64_t low, int64_t high) {
    const int64_t value = cell();
    if (error_.ok() && (value < low || value > high)) {
      complain(what, " must be in [", low, ", ", high, "], got ", value);
    }
    return error_.ok() ? value : low;
  }
  bool flag(const char* what) { return integer(what, 0, 1) != 0; }
  int scalar(const char* what) {
    return static_cast<int>(integer(what, 0, static_cast<int64_t>(model_.scalars.size()) - 1));
  }
  double number(const char* what) {
    const double value = std::bit_cast<double>(cell());
    if (error_.ok() && !std::isfinite(value)) complain(what, " must be finite");
    return error_.ok() ? value : 1.0;
  }
  float scale(const char* what) {
    const double value = number(what);
    const auto narrow = static_cast<float>(value);
    if (error_.ok() &&
        (static_cast<double>(narrow) != value || !std::isnormal(narrow) || narrow <= 0)) {
      complain(what, " must be a positive, finite and normal float32, got ", value);
    }
    return error_.ok() ? narrow : 1.0f;
  }
  int64_t cell() {
    if (next_ == count_) complain("has too few attributes");
    if (!error_.ok()) return 0;
    return cells_[next_++];
  }

  int read_operand() {
    const int64_t value = integer("input", 0, static_cast<int64_t>(model_.values.size()) - 1);
    if (error_.ok() && written_by_[value] == kNever) complain("reads a value before it is written");
    return static_cast<int>(value);
  }

  const Value& input(int i) const { return model_.values[step_.inputs[i]]; }
  const Value& output() const { return model_.values[step_.output]; }

  bool expect_inputs(size_t least, size_t most) {
    if (step_.inputs.size() >= least && step_.inputs.size() <= most) return true;
    return complain("has ", step_.inputs.size(), " inputs");
  }
  bool expect_codes(const Value& value) {
    return is_code(value.dtype) ||
           complain("needs codes, but '", value.name, "' is ", dtype_name(value.dtype));
  }
  bool expect_rank(const Value& value, int rank) {
    return value.rank == rank ||
           complain("needs '", value.name, "' of rank ", rank, ", it has ", value.rank);
  }
  bool expect_same_dtype() {
    return input(0).dtype == output().dtype || complain("changes the dtype");
  }

  // What the formula of the step asks of them. As of weights, nothing is damaged if they do not
  // fit.
  bool expect_scales(bool fit) {
    if (error_.ok() && !fit) {
      complain("has scales whose formula leaves the float32 range");
      error_.kind = ErrorKind::kUnsupported;
    }
    return error_.ok();
  }

  Operand operand(DType dtype) {
    Operand o;
    o.scale = scale("scale");
    o.zero_point = code("zero_point", dtype);
    return o;
  }
  int32_t code(const char* what, DType dtype) {
    const int64_t lowest = dtype == DType::kS8 ? -128 : 0;
    return static_cast<int32_t>(integer(what, lowest, lowest + 255));
  }
  Grid grid(DType dtype) {
    Grid g;
    const int64_t lowest = dtype == DType::kS8 ? -128 : 0;
    g.scale = scale("scale");
    g.zero_point = code("zero_point", dtype);
    // The writer's place for a float output is u8.
    g.qmin = static_cast<int32_t>(integer("qmin", lowest, lowest + 255));
    // A fused clamp may leave a single code, and none that means zero.
    g.qmax = static_cast<int32_t>(integer("qmax", g.qmin, lowest + 255));
    return g;
  }

  // A tensor of the plan; -1 if `optional`.
  int tensor(const char* what, DType dtype, bool optional = false) {
    const auto index = static_cast<int>(
        integer(what, optional ? -1 : 0, static_cast<int64_t>(model_.tensors.size()) - 1));
    if (error_.ok() && index >= 0 && model_.tensors[index].dtype != dtype) {
      complain(what, " must be ", dtype_name(dtype), ", got ",
               dtype_name(model_.tensors[index].dtype));
    }
    return index;
  }
  int table(const char* what, DType dtype, int64_t rows, bool optional = false) {
    const int index = tensor(what, dtype, optional);
    if (error_.ok() && index >= 0 && model_.tensors[index].elements != 256 * rows) {
      complain(what, " must have ", 256 * rows, " entries, it has ",
               model_.tensors[index].elements);
    }
    return index;
  }
  // A vector of one element, or of `channels` (any number, if that is -1).
  bool check_vector(const char* what, int index, int64_t channels) {
    if (!error_.ok() || index < 0) return error_.ok();
    const int64_t elements = model_.tensors[index].elements;
    if (elements >= 1 && (elements == 1 || channels == -1 || elements == channels)) return true;
    return complain(what, " has ", elements, " elements for ", channels, " channels");
  }
  bool check_scales(const char* what, int index, int64_t channels) {
    if (!check_vector(what, index, channels)) return false;
    const Tensor& t = model_.tensors[index];
    for (int64_t i = 0; i < t.elements; ++i) {
      if (!std::isnormal(t.f32()[i]) || t.f32()[i] <= 0) {
        return complain(what, " must be positive, finite and normal, got ", t.f32()[i]);
      }
    }
    return true;
  }
  bool check_zero_points(const char* what, int index, int64_t channels, int32_t low, int32_t high) {
    if (index < 0) return error_.ok();
    if (!check_vector(what, index, channels)) return false;
    const Tensor& t = model_.tensors[index];
    for (int64_t i = 0; i < t.elements; ++i) {
      if (t.s32()[i] < low || t.s32()[i] > high) {
        return complain(what, " must be in [", low, ", ", high, "], got ", t.s32()[i]);
      }
    }
    return true;
  }
  bool check_bias(int index, int64_t channels) {
    if (index < 0) return error_.ok();
    const Tensor& t = model_.tensors[index];
    if (t.elements != channels) {
      return complain("has a bias of ", t.elements, " elements for ", channels, " channels");
    }
    for (int64_t i = 0; i < channels; ++i) {
      if (!std::isfinite(t.f32()[i])) return complain("has a bias that is not finite");
    }
    return true;
  }

  bool read_attributes() {
    switch (step_.kind) {
      case StepKind::kConstant:
        return read_constant();
      case StepKind::kQuantize:
      case StepKind::kDequantize:
        return read_border();
      case StepKind::kLinear:
      case StepKind::kConv:
        return read_weighted();
      case StepKind::kAdd:
      case StepKind::kMul:
        return read_binary();
      case StepKind::kCat:
        return read_cat();
      case StepKind::kLookup:
        return read_lookup();
      case StepKind::kMaxPool:
      case StepKind::kAvgPool:
      case StepKind::kAdaptiveAvgPool:
        return read_pool();
      case StepKind::kInterpolate:
        return read_interpolate();
      case StepKind::kPad:
        return read_pad();
      case StepKind::kReshape:
      case StepKind::kPermute:
      case StepKind::kExpand:
        return read_shape();
      case StepKind::kSlice:
        return read_slice();
    }
    return false;
  }

  bool read_constant() {
    if (!expect_inputs(0, 0)) return false;
    ConstantStep s;
    s.tensor = tensor("tensor", output().dtype);
    step_.attributes = s;
    return error_.ok() && expect_rank(output(), model_.tensors[s.tensor].rank);
  }

  bool read_border() {
    const bool quantize = step_.kind == StepKind::kQuantize;
    if (!expect_inputs(1, 1)) return false;
    const Value& codes = quantize ? output() : input(0);
    const Value& floats = quantize ? input(0) : output();
    if (!expect_codes(codes) || !expect_rank(output(), input(0).rank)) return false;
    if (!is_float(floats.dtype)) return complain("needs a float value beside its codes");
    QuantizeStep s;
    s.axis = static_cast<int>(integer("axis", -1, input(0).rank - 1));
    const int32_t lowest = codes.dtype == DType::kS8 ? -128 : 0;
    s.scale = tensor("scale", DType::kF32);
    s.zero_point = tensor("zero_point", DType::kS32);
    s.qmin = lowest;
    s.qmax = lowest + 255;
    if (quantize) {
      s.qmin = static_cast<int32_t>(integer("qmin", lowest, lowest + 254));
      s.qmax = static_cast<int32_t>(integer("qmax", s.qmin + 1, lowest + 255));
    }
    if (!error_.ok()) return false;
    const int64_t grids = s.axis < 0 ? 1 : model_.tensors[s.scale].elements;
    if (!check_scales("scale", s.scale, grids) ||
        !check_zero_points("zero_point", s.zero_point, grids, s.qmin, s.qmax)) {
      return false;
    }
    if (model_.tensors[s.scale].elements != grids ||
        model_.tensors[s.zero_point].elements != grids) {
      return complain("has not one zero point a scale");
    }
    step_.attributes = s;
    return true;
  }

  bool read_weighted() {
    if (!expect_inputs(1, 2) || !expect_codes(input(0))) return false;
    const DType out = output().dtype;
    WeightedStep s;
    s.weight = tensor("weight", DType::kS8);
    if (!error_.ok()) return false;
    const Tensor& weight = model_.tensors[s.weight];
    s.weight_scale = tensor("weight_scale", DType::kF32);
    s.weight_zero_point = tensor("weight_zero_point", DType::kS32, true);
    s.bias = tensor("bias", DType::kF32, true);
    s.input = operand(input(0).dtype);
    s.output = grid(is_code(out) ? out : DType::kU8);
    s.table = table("table", is_code(out) ? out : DType::kU8, 1, true);
    s.has_residual = flag("residual");
    if (!error_.ok()) return false;
    if (s.has_residual != (step_.inputs.size() == 2)) return complain("has no residual operand");
    if (!is_code(out) && (s.has_residual || s.table >= 0)) {
      return complain("has a table or residual, but stores ", dtype_name(out));
    }
    if (s.has_residual) {
      if (!expect_codes(input(1))) return false;
      s.residual = operand(input(1).dtype);
      s.sum = grid(out);
      if (!expect_scales(is_add_scale(s.output.scale) && is_add_scale(s.residual.scale))) {
        return false;
      }
    }
    const bool fits = step_.kind == StepKind::kLinear ? read_linear_shape(weight, &s)
                                                      : read_conv_shape(weight, &s);
    if (!fits || !error_.ok()) return false;
    if (s.has_residual && !expect_rank(input(1), output().rank)) return false;
    const int64_t channels = s.conv.out_channels;
    step_.attributes = s;
    return check_scales("weight_scale", s.weight_scale, channels) &&
           check_zero_points("weight_zero_point", s.weight_zero_point, channels, -128, 127) &&
           check_bias(s.bias, channels);
  }

  bool read_linear_shape(const Tensor& weight, WeightedStep* s) {
    if (weight.rank != 2) return complain("needs a weight of rank 2");
    s->conv.out_channels = weight.dims[0];
    s->conv.in_channels = weight.dims[1];
    if (input(0).rank < 1) return complain("needs an input with a dimension");
    if (weight.elements == 0) return complain("has an empty weight");
    return expect_rank(output(), input(0).rank);
  }

  bool read_conv_shape(const Tensor& weight, WeightedStep* s) {
    const auto dims = static_cast<int>(integer("dimensions", 1, kConvDims));
    if (!error_.ok()) return false;
    if (weight.rank != dims + 2) return complain("needs a weight of rank ", dims + 2);
    if (!expect_rank(input(0), dims + 2) || !expect_rank(output(), dims + 2)) return false;
    const int first = kConvDims - dims;
    ConvShape& c = s->conv;
    c.spatial_dims = dims;
    for (int d = 0; d < dims; ++d) c.kernel[first + d] = weight.dims[2 + d];
    for (int d = 0; d < dims; ++d) c.stride[first + d] = integer("stride", 1, kWindow);
    for (int d = 0; d < dims; ++d) {
      c.pad_lo[first + d] = integer("padding", 0, kWindow);
      c.pad_hi[first + d] = integer("padding", 0, kWindow);
    }
    for (int d = 0; d < dims; ++d) c.dilation[first + d] = integer("dilation", 1, kWindow);
    for (int d = 0; d < dims; ++d) {
      s->output_padding[first + d] = integer("output_padding", 0, kWindow);
    }
    c.groups = integer("groups", 1, INT32_MAX);
    c.transposed = flag("transposed");
    c.padding_mode = static_cast<PaddingMode>(integer("padding_mode", 0, 3));
    if (!error_.ok()) return false;
    if (weight.dims[0] % c.groups != 0) return complain("has groups that do not divide its weight");
    c.in_channels = c.transposed ? weight.dims[0] : weight.dims[1] * c.groups;
    c.out_channels = c.transposed ? weight.dims[1] * c.groups : weight.dims[0];
    for (int d = 0; d < kConvDims; ++d) {
      const int64_t slack = c.stride[d] > c.dilation[d] ? c.stride[d] : c.dilation[d];
      if (s->output_padding[d] != 0 && (!c.transposed || s->output_padding[d] >= slack)) {
        return complain("has an impossible output_padding");
      }
    }
    if (check_conv_shape(c) != Status::kOk || !check_windows(c.kernel, c.dilation)) {
      return complain("has an impossible geometry");
    }
    return true;
  }

  static bool check_windows(const int64_t kernel[3], const int64_t dilation[3]) {
    for (int d = 0; d < 3; ++d) {
      if ((kernel[d] - 1) * dilation[d] >= kLimit) return false;
    }
    return true;
  }

  bool read_binary() {
    if (!expect_inputs(2, 2) || !expect_codes(input(0)) || !expect_codes(input(1)) ||
        !expect_codes(output())) {
      return false;
    }
    const int rank = input(0).rank > input(1).rank ? input(0).rank : input(1).rank;
    BinaryStep s;
    s.a = operand(input(0).dtype);
    s.b = operand(input(1).dtype);
    s.output = grid(output().dtype);
    const bool fit = step_.kind == StepKind::kAdd
                         ? is_add_scale(s.a.scale) && is_add_scale(s.b.scale)
                         : is_finite(mul_multiplier(s.a.scale, s.b.scale, s.output.scale));
    step_.attributes = s;
    return expect_scales(fit) && expect_rank(output(), rank);
  }

  bool read_cat() {
    if (!expect_inputs(1, kMaxOperands) || !expect_codes(output())) return false;
    if (output().rank < 1) return complain("needs values with a dimension");
    for (size_t i = 0; i < step_.inputs.size(); ++i) {
      const Value& value = input(static_cast<int>(i));
      if (!expect_codes(value) || !expect_rank(value, output().rank)) return false;
    }
    CatStep s;
    s.dim = static_cast<int>(integer("dim", 0, output().rank - 1));
    s.tables = table("tables", output().dtype, static_cast<int64_t>(step_.inputs.size()));
    step_.attributes = s;
    return true;
  }

  bool read_lookup() {
    if (!expect_inputs(1, 1) || !expect_codes(input(0)) || !expect_codes(output())) return false;
    step_.attributes = LookupStep{table("table", output().dtype, 1)};
    return expect_rank(output(), input(0).rank);
  }

  bool read_pool() {
    if (!expect_inputs(1, 1) || !expect_codes(input(0)) || !expect_codes(output())) return false;
    PoolStep s;
    s.dims = static_cast<int>(integer("dimensions", 1, 3));
    if (!error_.ok() || !expect_rank(input(0), s.dims + 2) || !expect_rank(output(), s.dims + 2)) {
      return false;
    }
    const int first = 3 - s.dims;
    if (step_.kind == StepKind::kAdaptiveAvgPool) {
      for (int d = 0; d < s.dims; ++d) {
        s.size[first + d] = static_cast<int>(
            integer("output size", -1, static_cast<int64_t>(model_.scalars.size()) - 1));
      }
    } else {
      for (int d = 0; d < s.dims; ++d) s.kernel[first + d] = integer("kernel", 1, kWindow);
      for (int d = 0; d < s.dims; ++d) s.stride[first + d] = integer("stride", 1, kWindow);
      for (int d = 0; d < s.dims; ++d) s.padding[first + d] = integer("padding", 0, kWindow);
      if (step_.kind == StepKind::kMaxPool) {
        for (int d = 0; d < s.dims; ++d) s.dilation[first + d] = integer("dilation", 1, kWindow);
      }
      s.ceil_mode = flag("ceil_mode");
    }
    if (!check_windows(s.kernel, s.dilation)) return complain("has an impossible window");
    if (step_.kind == StepKind::kAvgPool) {
      s.count_include_pad = flag("count_include_pad");
      s.divisor = integer("divisor_override", 0, INT32_MAX);
    }
    if (step_.kind == StepKind::kMaxPool) {
      if (!expect_same_dtype()) return false;
    } else {
      s.input = operand(input(0).dtype);
      s.output = grid(output().dtype);
      if (!expect_scales(is_finite(s.input.scale / s.output.scale))) return false;
    }
    step_.attributes = s;
    return error_.ok();
  }

  bool read_interpolate() {
    if (!expect_inputs(1, 1) || !expect_codes(input(0)) || !expect_same_dtype()) return false;
    InterpolateStep s;
    s.dims = static_cast<int>(integer("dimensions", 1, 3));
    if (!error_.ok() || !expect_rank(input(0), s.dims + 2) || !expect_rank(output(), s.dims + 2)) {
      return false;
    }
    s.exact = flag("exact");
    s.sized = flag("sized");
    for (int d = 0; d < s.dims; ++d) {
      if (s.sized) {
        s.size[3 - s.dims + d] = scalar("size");
        continue;
      }
      const double factor = s.factor[3 - s.dims + d] = number("scale_factor");
      if (error_.ok() && !(factor > 0 && factor < 1e6)) complain("has an impossible scale_factor");
    }
    step_.attributes = s;
    return error_.ok();
  }

  bool read_pad() {
    if (!expect_inputs(1, 1) || !expect_same_dtype() || !expect_rank(output(), input(0).rank)) {
      return false;
    }
    PadStep s;
    s.pairs = static_cast<int>(integer("pairs", 0, input(0).rank));
    for (int i = 0; error_.ok() && i < 2 * s.pairs; ++i) s.amounts[i] = scalar("amount");
    s.value = is_code(input(0).dtype) ? code("value", input(0).dtype) : integer("value", 0, 0);
    step_.attributes = s;
    return error_.ok();
  }

  bool read_shape() {
    if (!expect_inputs(1, 1) || !expect_same_dtype()) return false;
    ShapeStep s;
    s.rank = static_cast<int>(integer("rank", 0, kMaxRank));
    if (!error_.ok() || !expect_rank(output(), s.rank)) return false;
    if (step_.kind == StepKind::kReshape) {
      for (int d = 0; d < s.rank; ++d) s.items[d] = scalar("size");
    } else if (step_.kind == StepKind::kExpand) {
      if (s.rank < input(0).rank) return complain("drops a dimension");
      for (int d = 0; d < s.rank; ++d) s.items[d] = scalar("size");
    } else {
      if (!expect_rank(input(0), s.rank)) return false;
      int seen = 0;
      for (int d = 0; d < s.rank; ++d) {
        s.items[d] = static_cast<int>(integer("dimension", 0, s.rank - 1));
        seen |= 1 << s.items[d];
      }
      if (error_.ok() && seen != (1 << s.rank) - 1) return complain("repeats a dimension");
    }
    step_.attributes = s;
    return error_.ok();
  }

  bool read_slice() {
    if (!expect_inputs(1, 1) || !expect_same_dtype() || !expect_rank(output(), input(0).rank)) {
      return false;
    }
    if (input(0).rank < 1) return complain("needs a dimension");
    SliceStep s;
    s.dim = static_cast<int>(integer("dim", 0, input(0).rank - 1));
    s.start = scalar("start");
    s.stop = scalar("stop");
    s.step = integer("step", 1, INT32_MAX);
    step_.attributes = s;
    return error_.ok();
  }

  const Model& model_;
  const std::vector<int64_t>& written_by_;
  const int64_t index_;
  const int64_t* cells_;
  const int64_t count_;
  Step& step_;
  Error error_;
  int64_t next_ = 0;
};

}  // namespace

Error read_step(const Model& model, const std::vector<int64_t>& written_by, int64_t index,
                const int64_t* cells, int64_t count, int inputs, Step* step) {
  return StepReader(model, written_by, index, cells, count, step).read(inputs);
}

}  // namespace qk::plan
