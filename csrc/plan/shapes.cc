#include "csrc/plan/shapes.h"

#include <algorithm>
#include <cmath>

#include "csrc/pool/pool.h"

namespace qk::plan {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 40;  // of one value
constexpr int64_t kMaxResized = int64_t{1} << 24;   // of one dimension

int64_t floor_div(int64_t a, int64_t b) {
  const int64_t q = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q;
}

// False on overflow or division by zero.
bool evaluate(ScalarOp op, int64_t a, int64_t b, int64_t* result) {
  const bool divides = op == ScalarOp::kFloorDiv || op == ScalarOp::kMod;
  if (divides && (b == 0 || (a == INT64_MIN && b == -1))) return false;
  switch (op) {
    case ScalarOp::kAdd:
      return !__builtin_add_overflow(a, b, result);
    case ScalarOp::kSub:
      return !__builtin_sub_overflow(a, b, result);
    case ScalarOp::kMul:
      return !__builtin_mul_overflow(a, b, result);
    case ScalarOp::kFloorDiv:
      *result = floor_div(a, b);
      return true;
    case ScalarOp::kMod:
      *result = a - floor_div(a, b) * b;
      return true;
    case ScalarOp::kMin:
      *result = a < b ? a : b;
      return true;
    case ScalarOp::kMax:
      *result = a > b ? a : b;
      return true;
    default:
      return false;
  }
}

class Inference {
 public:
  Inference(const Model& model, Shapes* shapes) : model_(model), shapes_(*shapes) {}

  Error run(const std::vector<Sizes>& inputs) {
    shapes_.values.assign(model_.values.size(), Sizes{});
    shapes_.scalars.assign(model_.scalars.size(), 0);
    scalar_known_.assign(model_.scalars.size(), 0);
    if (!take_inputs(inputs)) return error_;
    sort_scalars();
    for (size_t i = 0; i < model_.steps.size(); ++i) {
      compute_scalars(static_cast<int64_t>(i));
      const Step& step = model_.steps[i];
      step_ = &step;
      Sizes& out = shapes_.values[step.output];
      out.rank = model_.values[step.output].rank;
      if (!infer(&out) || !check_size(out)) return error_;
    }
    return error_;
  }

 private:
  template <typename... Parts>
  bool fail(const Parts&... parts) {
    error_ = error(ErrorKind::kArgument, "plan: step '", step_->name, "' (",
                   step_kind_name(step_->kind), "): ", parts...);
    return false;
  }

  bool take_inputs(const std::vector<Sizes>& inputs) {
    if (inputs.size() != model_.inputs.size()) {
      error_ = error(ErrorKind::kArgument, "plan: expected ", model_.inputs.size(), " inputs, got ",
                     inputs.size());
      return false;
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      const ModelInput& input = model_.inputs[i];
      const Value& value = model_.values[input.value];
      bool fits = inputs[i].rank == value.rank;
      int64_t elements = 1;
      for (int d = 0; fits && d < value.rank; ++d) {
        const int64_t size = inputs[i][d];
        fits = size >= 0 && (input.dims[d] == -1 || input.dims[d] == size) &&
               !__builtin_mul_overflow(elements, size, &elements) && elements <= kMaxElements;
      }
      if (!fits) {
        std::string wanted;
        for (int d = 0; d < value.rank; ++d) {
          wanted += (d ? ", " : "") +
                    (input.dims[d] == -1 ? std::string("any") : std::to_string(input.dims[d]));
        }
        error_ = error(ErrorKind::kArgument, "plan: input ", i, " ('", value.name,
                       "') must have shape [", wanted, "], got ", inputs[i]);
        return false;
      }
      shapes_.values[input.value] = inputs[i];
    }
    return true;
  }

  bool check_size(const Sizes& size) {
    int64_t elements = 1;
    for (int d = 0; d < size.rank; ++d) {
      if (size[d] < 0) return fail("the output would have shape ", size);
      if (size[d] > 0 &&
          (__builtin_mul_overflow(elements, size[d], &elements) || elements > kMaxElements)) {
        return fail("the output is too large: ", size);
      }
    }
    return true;
  }

  const Sizes& input(int i) const { return shapes_.values[step_->inputs[i]]; }

  // Scalars in the order in which they become known.
  void sort_scalars() {
    order_.resize(model_.scalars.size());
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<int>(i);
    std::stable_sort(order_.begin(), order_.end(), [this](int a, int b) {
      return model_.scalar_after[a] < model_.scalar_after[b];
    });
  }
  void compute_scalars(int64_t step) {
    for (; next_ < order_.size() && model_.scalar_after[order_[next_]] < step; ++next_) {
      const int i = order_[next_];
      const Scalar& s = model_.scalars[i];
      int64_t& value = shapes_.scalars[i];
      if (s.op == ScalarOp::kConst) {
        value = s.number;
      } else if (s.op == ScalarOp::kSize) {
        value = shapes_.values[s.value][s.a];
      } else if (!scalar_known_[s.a] || !scalar_known_[s.b] ||
                 !evaluate(s.op, shapes_.scalars[s.a], shapes_.scalars[s.b], &value)) {
        continue;
      }
      scalar_known_[i] = 1;
    }
  }
  bool scalar(int index, int64_t* value) {
    if (!scalar_known_[index]) return fail("a size or an index that it is given is out of range");
    *value = shapes_.scalars[index];
    return true;
  }

  bool infer(Sizes* out) {
    switch (step_->kind) {
      case StepKind::kConstant: {
        const Tensor& tensor = model_.tensors[step_->as<ConstantStep>().tensor];
        for (int d = 0; d < tensor.rank; ++d) (*out)[d] = tensor.dims[d];
        return true;
      }
      case StepKind::kQuantize:
      case StepKind::kDequantize: {
        const auto& s = step_->as<QuantizeStep>();
        *out = input(0);
        const int64_t grids = model_.tensors[s.scale].elements;
        return s.axis < 0 || input(0)[s.axis] == grids ||
               fail("dimension ", s.axis, " must have ", grids, " channels, got ", input(0));
      }
      case StepKind::kLookup:
        *out = input(0);
        return true;
      case StepKind::kLinear:
        return linear(step_->as<WeightedStep>(), out);
      case StepKind::kConv:
        return conv(step_->as<WeightedStep>(), out);
      case StepKind::kAdd:
      case StepKind::kMul:
        return binary(out);
      case StepKind::kCat:
        return cat(step_->as<CatStep>().dim, out);
      case StepKind::kMaxPool:
      case StepKind::kAvgPool:
        return pool(step_->as<PoolStep>(), out);
      case StepKind::kAdaptiveAvgPool:
        return adaptive(step_->as<PoolStep>(), out);
      case StepKind::kInterpolate:
        return interpolate(step_->as<InterpolateStep>(), out);
      case StepKind::kPad:
        return pad(step_->as<PadStep>(), out);
      case StepKind::kReshape:
        return reshape(step_->as<ShapeStep>(), out);
      case StepKind::kPermute:
        for (int d = 0; d < out->rank; ++d) {
          (*out)[d] = input(0)[step_->as<ShapeStep>().items[d]];
        }
        return true;
      case StepKind::kSlice:
        return slice(step_->as<SliceStep>(), out);
      case StepKind::kExpand:
        return expand(step_->as<ShapeStep>(), out);
    }
    return false;
  }

  bool check_residual(const WeightedStep& s, const Sizes& out) {
    return !s.has_residual || input(1) == out ||
           fail("the residual must have shape ", out, ", as the output, got ", input(1));
  }

  bool linear(const WeightedStep& s, Sizes* out) {
    *out = input(0);
    if (input(0)[out->rank - 1] != s.conv.in_channels) {
      return fail("input must have shape [..., ", s.conv.in_channels, "], got ", input(0));
    }
    (*out)[out->rank - 1] = s.conv.out_channels;
    return check_residual(s, *out);
  }

  bool conv(const WeightedStep& s, Sizes* out) {
    const ConvShape& c = s.conv;
    const Sizes& in = input(0);
    if (in[1] != c.in_channels)
      return fail("input must have ", c.in_channels, " channels, got ", in);
    (*out)[0] = in[0];
    (*out)[1] = c.out_channels;
    ConvExtent extent;
    extent.batch = in[0];
    for (int i = 0; i < c.spatial_dims; ++i) {
      const int d = kConvDims - c.spatial_dims + i;
      const int64_t size = in[2 + i], window = (c.kernel[d] - 1) * c.dilation[d] + 1;
      const int64_t pad = c.pad_lo[d] + c.pad_hi[d];
      if (size > INT32_MAX) return fail("input ", in, " is too large");
      extent.in[d] = size;
      if (c.transposed) {
        extent.out[d] = (size - 1) * c.stride[d] + window - pad + s.output_padding[d];
      } else {
        extent.out[d] = floor_div(size + pad - window, c.stride[d]) + 1;
      }
      (*out)[2 + i] = extent.out[d];
    }
    if (check_conv_extent(c, extent) != Status::kOk) {
      return fail("input ", in, " does not fit the kernel, its stride and padding");
    }
    return check_residual(s, *out);
  }

  bool binary(Sizes* out) {
    const Sizes &a = input(0), &b = input(1);
    for (int d = 0; d < out->rank; ++d) {
      const int da = d - (out->rank - a.rank), db = d - (out->rank - b.rank);
      const int64_t na = da < 0 ? 1 : a[da], nb = db < 0 ? 1 : b[db];
      if (na != nb && na != 1 && nb != 1) {
        return fail("shapes ", a, " and ", b, " do not broadcast");
      }
      (*out)[d] = na == 1 ? nb : na;
    }
    return true;
  }

  bool cat(int dim, Sizes* out) {
    *out = input(0);
    int64_t total = 0;
    for (size_t i = 0; i < step_->inputs.size(); ++i) {
      Sizes same = input(static_cast<int>(i));
      total += same[dim];
      same[dim] = input(0)[dim];
      if (!(same == input(0))) {
        return fail("shapes ", input(0), " and ", input(static_cast<int>(i)),
                    " differ outside of dimension ", dim);
      }
    }
    (*out)[dim] = total;
    return true;
  }

  // Pools need an input that is empty at most in the batch.
  bool check_pooled(const Sizes& in) {
    for (int d = 1; d < in.rank; ++d) {
      if (in[d] < 1) return fail("the input must not be empty outside of the batch, got ", in);
    }
    return true;
  }

  bool pool(const PoolStep& s, Sizes* out) {
    const Sizes& in = input(0);
    if (!check_pooled(in)) return false;
    *out = in;
    int64_t window = 1;
    for (int i = 0; i < s.dims; ++i) {
      const int d = 3 - s.dims + i;
      const int64_t extent = s.dilation[d] * (s.kernel[d] - 1) + 1;
      const int64_t room = in[2 + i] + 2 * s.padding[d] - extent;
      const int64_t slack = s.ceil_mode ? s.stride[d] - 1 : 0;
      if (s.padding[d] > extent / 2 || room + slack < 0) {
        return fail("input ", in, " does not fit the window, its stride and padding");
      }
      int64_t size = (room + slack) / s.stride[d] + 1;
      if (s.ceil_mode && (size - 1) * s.stride[d] >= in[2 + i] + s.padding[d]) --size;
      if (window > kMaxPoolWindow / s.kernel[d]) return fail("the window is too large");
      window *= s.kernel[d];
      (*out)[2 + i] = size;
    }
    return true;
  }

  bool adaptive(const PoolStep& s, Sizes* out) {
    const Sizes& in = input(0);
    if (!check_pooled(in)) return false;
    *out = in;
    int64_t window = 1;
    for (int i = 0; i < s.dims; ++i) {
      const int wanted = s.size[3 - s.dims + i];
      if (wanted < 0) continue;
      int64_t size;
      if (!scalar(wanted, &size)) return false;
      if (size < 1) return fail("the output size must be positive, got ", size);
      (*out)[2 + i] = size;
      window *= in[2 + i] / size + 2;
      if (window > kMaxPoolWindow) return fail("the window is too large");
    }
    return true;
  }

  bool interpolate(const InterpolateStep& s, Sizes* out) {
    const Sizes& in = input(0);
    if (!check_pooled(in)) return false;
    *out = in;
    for (int i = 0; i < s.dims; ++i) {
      const int d = 3 - s.dims + i;
      int64_t size;
      if (s.sized) {
        if (!scalar(s.size[d], &size)) return false;
      } else {
        const double scaled = std::floor(static_cast<double>(in[2 + i]) * s.factor[d]);
        size = scaled < 1e12 ? static_cast<int64_t>(scaled) : kMaxElements;
      }
      if (size < 1 || size > kMaxResized) {
        return fail("the output size must be in [1, ", kMaxResized, "], got ", size);
      }
      (*out)[2 + i] = size;
    }
    return true;
  }

  bool pad(const PadStep& s, Sizes* out) {
    const Sizes& in = input(0);
    *out = in;
    for (int i = 0; i < s.pairs; ++i) {
      int64_t amounts[2];
      if (!scalar(s.amounts[2 * i], &amounts[0]) || !scalar(s.amounts[2 * i + 1], &amounts[1])) {
        return false;
      }
      for (const int64_t amount : amounts) {
        if (amount > kMaxElements || amount < -kMaxElements) return fail("impossible padding");
      }
      const int d = in.rank - 1 - i;
      // Cropping may not take more than there is.
      const int64_t crop = (amounts[0] < 0 ? -amounts[0] : 0) + (amounts[1] < 0 ? -amounts[1] : 0);
      if (crop > in[d]) return fail("cropping ", crop, " of input ", in);
      (*out)[d] += amounts[0] + amounts[1];
    }
    return true;
  }

  bool reshape(const ShapeStep& s, Sizes* out) {
    const int64_t elements = input(0).elements();
    int64_t known = 1;
    int inferred = -1;
    for (int d = 0; d < s.rank; ++d) {
      int64_t size;
      if (!scalar(s.items[d], &size)) return false;
      (*out)[d] = size;
      if (size == -1) {
        if (inferred >= 0) return fail("more than one size is -1");
        inferred = d;
      } else if (size < 0 || size > kMaxElements || __builtin_mul_overflow(known, size, &known) ||
                 known > kMaxElements) {
        return fail("cannot give input ", input(0), " the size ", size);
      }
    }
    if (inferred >= 0) {
      if (known == 0 || elements % known != 0) {
        return fail("cannot give input ", input(0), " the shape ", *out);
      }
      (*out)[inferred] = elements / known;
    } else if (known != elements) {
      return fail("cannot give input ", input(0), " the shape ", *out);
    }
    return true;
  }

  bool slice(const SliceStep& s, Sizes* out) {
    int64_t start, stop;
    if (!scalar(s.start, &start) || !scalar(s.stop, &stop)) return false;
    *out = input(0);
    (*out)[s.dim] = slice_of(start, stop, s.step, input(0)[s.dim]).count;
    return true;
  }

  bool expand(const ShapeStep& s, Sizes* out) {
    const Sizes& in = input(0);
    for (int d = 0; d < s.rank; ++d) {
      const int from = d - (s.rank - in.rank);
      int64_t size;
      if (!scalar(s.items[d], &size)) return false;
      if (size == -1 && from >= 0) size = in[from];
      if (size < 0 || (from >= 0 && in[from] != 1 && in[from] != size)) {
        return fail("cannot expand input ", in, " to size ", size);
      }
      (*out)[d] = size;
    }
    return true;
  }

  const Model& model_;
  Shapes& shapes_;
  std::vector<uint8_t> scalar_known_;
  std::vector<int> order_;
  size_t next_ = 0;  // in order_
  const Step* step_ = nullptr;
  Error error_;
};

}  // namespace

Slice slice_of(int64_t start, int64_t stop, int64_t step, int64_t size) {
  const auto place = [size](int64_t at) {
    if (at < 0) at = at < -size ? 0 : at + size;
    return at > size ? size : at;
  };
  const int64_t first = place(start), last = place(stop);
  return {first, last > first ? (last - first - 1) / step + 1 : 0};
}

Error infer_shapes(const Model& model, const std::vector<Sizes>& inputs, Shapes* shapes) {
  return Inference(model, shapes).run(inputs);
}

}  // namespace qk::plan
