#include "python/foreach.h"

#include <string>

#include "csrc/fake_quant/fake_quant.h"

namespace qk::seam {
namespace {

void check_ends(const char* op, int64_t qmin, int64_t qmax) {
  STD_TORCH_CHECK(qmin < qmax, op, ": qmin must be below qmax, got qmin ", qmin, " and qmax ",
                  qmax);
  STD_TORCH_CHECK(qmin >= -kFakeQuantLimit && qmax <= kFakeQuantLimit, op,
                  ": qmin and qmax must be in [-2^21, 2^21], got qmin ", qmin, " and qmax ", qmax);
}

void check_count(const char* op, const char* name, size_t count, size_t expected) {
  STD_TORCH_CHECK(count == expected, op, ": ", name, " must have ", expected,
                  " elements, as xs has, got ", count);
}

// -1 (from the wrapper's None) is per tensor.
std::optional<int64_t> axis_of(const char* op, const Tensor& x, int64_t axis) {
  return axis == -1 ? std::nullopt : check_axis(op, x, axis);
}

// One contiguous row a channel.
bool is_row_form(const Tensor& x, std::optional<int64_t> axis) {
  if (!is_dense(x)) return false;
  if (!axis.has_value() || x.numel() == 0) return true;
  return x.size(*axis) == 1 || x.stride(*axis) * x.size(*axis) == x.numel();
}

FloatType check_item(const char* op, const Tensor& x, const Tensor& first,
                     std::optional<int64_t> axis) {
  const FloatType type = check_float_type(op, "xs", x);
  check_device(op, "xs", x, first);
  STD_TORCH_CHECK(is_row_form(x, axis), op,
                  ": each of xs must be dense with its channels outermost in memory (or per "
                  "tensor); got shape ",
                  shape_text(x), " with axis ", axis.value_or(-1), "; use fake_quant for it");
  return type;
}

ForeachItem make_item(const Tensor& x, FloatType type, int64_t rows, float* scale,
                      int32_t* zero_point) {
  return {.x = x.const_data_ptr(),
          .type = type,
          .rows = rows,
          .inner = rows > 0 ? x.numel() / rows : 0,
          .scale = scale,
          .zero_point = zero_point};
}

// A given grid; csrc reads it only.
ForeachItem given_item(const char* op, const Tensor& x, const Tensor& first, const Tensor& scale,
                       const Tensor& zero_point, int64_t axis, int64_t qmin, int64_t qmax,
                       GridView* view) {
  const std::optional<int64_t> dim = axis_of(op, x, axis);
  const FloatType type = check_item(op, x, first, dim);
  *view = check_grid(op, x, scale, zero_point, dim, qmin, qmax);
  return make_item(x, type, view->channels, const_cast<float*>(view->scale),
                   const_cast<int32_t*>(view->zero_point));
}

}  // namespace

Tensors foreach_fake_quant_on(const ForeachDevice& device, const Tensors& xs, const Tensors& scales,
                              const Tensors& zero_points, const std::vector<int64_t>& axes,
                              int64_t qmin, int64_t qmax) {
  const char* op = "foreach_fake_quant";
  check_ends(op, qmin, qmax);
  check_count(op, "scales", scales.size(), xs.size());
  check_count(op, "zero_points", zero_points.size(), xs.size());
  check_count(op, "axes", axes.size(), xs.size());
  Tensors ys;
  std::vector<GridView> grids(xs.size());
  std::vector<ForeachQuantItem> items;
  for (size_t i = 0; i < xs.size(); ++i) {
    const ForeachItem in =
        given_item(op, xs[i], xs[0], scales[i], zero_points[i], axes[i], qmin, qmax, &grids[i]);
    ys.push_back(empty_like(xs[i], xs[i].scalar_type()));
    items.push_back({.in = in, .y = ys.back().mutable_data_ptr(), .q = nullptr, .flags = nullptr});
  }
  const GridRule rule{static_cast<int32_t>(qmin), static_cast<int32_t>(qmax), false, 0};
  if (xs.empty()) return ys;
  device.quantize(op, xs[0], {items.data(), static_cast<int64_t>(items.size()), rule, false},
                  nullptr);
  return ys;
}

Tensors foreach_fake_quant_backward_on(const ForeachDevice& device, const Tensors& grads,
                                       const Tensors& xs, const Tensors& scales,
                                       const Tensors& zero_points, const std::vector<int64_t>& axes,
                                       int64_t qmin, int64_t qmax) {
  const char* op = "foreach_fake_quant_backward";
  check_ends(op, qmin, qmax);
  check_count(op, "grads", grads.size(), xs.size());
  check_count(op, "scales", scales.size(), xs.size());
  check_count(op, "zero_points", zero_points.size(), xs.size());
  check_count(op, "axes", axes.size(), xs.size());
  Tensors outs, owners;
  std::vector<GridView> grids(xs.size());
  std::vector<ForeachBackwardItem> items;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor& x = xs[i];
    const ForeachItem in =
        given_item(op, x, xs[0], scales[i], zero_points[i], axes[i], qmin, qmax, &grids[i]);
    check_device(op, "grads", grads[i], x);
    STD_TORCH_CHECK(grads[i].scalar_type() == x.scalar_type() && sizes_of(grads[i]) == sizes_of(x),
                    op, ": each of grads must have the dtype and shape of its x, ",
                    dtype_text(x.scalar_type()), " ", shape_text(x), ", got ",
                    dtype_text(grads[i].scalar_type()), " ", shape_text(grads[i]));
    outs.push_back(empty_like(x, x.scalar_type()));
    owners.push_back(
        strides_of(grads[i]) == strides_of(outs[i]) ? grads[i] : copy_in_layout(grads[i], outs[i]));
    items.push_back(
        {.in = in, .grad = owners.back().const_data_ptr(), .out = outs.back().mutable_data_ptr()});
  }
  if (xs.empty()) return outs;
  device.backward(op, xs[0],
                  {items.data(), static_cast<int64_t>(items.size()), static_cast<int32_t>(qmin),
                   static_cast<int32_t>(qmax)});
  return outs;
}

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensor> foreach_observe_fake_quant_on(
    const ForeachDevice& device, const Tensors& xs, const std::vector<int64_t>& axes, int64_t qmin,
    int64_t qmax, bool symmetric, double min_scale, std::optional<ScalarType> code_dtype) {
  const char* op = "foreach_observe_fake_quant";
  check_ends(op, qmin, qmax);
  check_count(op, "axes", axes.size(), xs.size());
  bool q_signed = false;
  if (code_dtype.has_value()) {
    q_signed = check_code_type(op, "code_dtype", *code_dtype);
    check_code_range(op, *code_dtype, qmin, qmax);
  }
  Tensors ys, codes, scales, zero_points;
  std::vector<ForeachQuantItem> items;
  int64_t rows = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor& x = xs[i];
    const std::optional<int64_t> axis = axis_of(op, x, axes[i]);
    const FloatType type = check_item(op, x, xs[0], axis);
    const int64_t channels = axis.has_value() ? x.size(*axis) : 1;
    ys.push_back(empty_like(x, x.scalar_type()));
    scales.push_back(empty(x, {channels}, ScalarType::Float));
    zero_points.push_back(empty(x, {channels}, ScalarType::Int));
    if (code_dtype.has_value()) codes.push_back(empty_like(x, *code_dtype));
    items.push_back({.in = make_item(x, type, channels, scales[i].mutable_data_ptr<float>(),
                                     zero_points[i].mutable_data_ptr<int32_t>()),
                     .y = ys[i].mutable_data_ptr(),
                     .q = code_dtype.has_value() ? codes[i].mutable_data_ptr() : nullptr,
                     .flags = nullptr});
    rows += channels;
  }
  const GridRule rule{static_cast<int32_t>(qmin), static_cast<int32_t>(qmax), symmetric,
                      check_scale(op, "min_scale", min_scale)};
  const auto count = static_cast<int64_t>(xs.size());
  if (xs.empty()) {
    return {ys, codes, scales, zero_points, empty_on_cpu({count}, ScalarType::Bool)};
  }
  Tensor flags = empty(xs[0], {rows}, ScalarType::Byte);
  Tensor clipped = empty(xs[0], {count}, ScalarType::Bool);
  uint8_t* flag = flags.mutable_data_ptr<uint8_t>();
  for (ForeachQuantItem& item : items) {
    item.flags = flag;
    flag += item.in.rows;
  }
  device.quantize(op, xs[0], {items.data(), count, rule, q_signed}, &clipped);
  return {ys, codes, scales, zero_points, clipped};
}

namespace {

void quantize_on_cpu(const char* op, const Tensor&, const ForeachQuantArgs& args, Tensor* clipped) {
  qk::foreach_fake_quant(args, torch_threads());
  for (int64_t i = 0; clipped != nullptr && i < args.count; ++i) {
    const ForeachQuantItem& item = args.items[i];
    uint8_t worst = kRowFine;
    for (int64_t row = 0; row < item.in.rows; ++row) worst |= item.flags[row];
    STD_TORCH_CHECK(!(worst & kRowNotFinite), op, ": xs[", i,
                    "] must be finite, got NaN or infinite values; no grid can be chosen from it");
    clipped->mutable_data_ptr<bool>()[i] = worst != kRowFine;
  }
}

void backward_on_cpu(const char*, const Tensor&, const ForeachBackwardArgs& args) {
  qk::foreach_fake_quant_backward(args, torch_threads());
}

constexpr ForeachDevice kCpu{quantize_on_cpu, backward_on_cpu};

Tensors foreach_fake_quant(const Tensors& xs, const Tensors& scales, const Tensors& zero_points,
                           const std::vector<int64_t>& axes, int64_t qmin, int64_t qmax) {
  return foreach_fake_quant_on(kCpu, xs, scales, zero_points, axes, qmin, qmax);
}

Tensors foreach_fake_quant_backward(const Tensors& grads, const Tensors& xs, const Tensors& scales,
                                    const Tensors& zero_points, const std::vector<int64_t>& axes,
                                    int64_t qmin, int64_t qmax) {
  return foreach_fake_quant_backward_on(kCpu, grads, xs, scales, zero_points, axes, qmin, qmax);
}

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensor> foreach_observe_fake_quant(
    const Tensors& xs, const std::vector<int64_t>& axes, int64_t qmin, int64_t qmax, bool symmetric,
    double min_scale, std::optional<ScalarType> code_dtype) {
  return foreach_observe_fake_quant_on(kCpu, xs, axes, qmin, qmax, symmetric, min_scale,
                                       code_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("foreach_fake_quant", TORCH_BOX(&foreach_fake_quant));
  m.impl("foreach_fake_quant_backward", TORCH_BOX(&foreach_fake_quant_backward));
  m.impl("foreach_observe_fake_quant", TORCH_BOX(&foreach_observe_fake_quant));
}

}  // namespace qk::seam
