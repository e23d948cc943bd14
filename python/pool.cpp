#include "python/pool.h"

namespace qk::seam {
namespace {

// Checked: a list of one integer a spatial dimension, each from `lowest` to 2^31 - 1.
std::vector<int64_t> check_list(const char* op, const char* name, const std::vector<int64_t>& list,
                                int64_t spatial, int64_t lowest) {
  STD_TORCH_CHECK(static_cast<int64_t>(list.size()) == spatial, op, ": ", name, " must have ",
                  spatial, " elements (one a spatial dimension), got ", list.size());
  for (int64_t v : list) {
    STD_TORCH_CHECK(v >= lowest && v <= INT32_MAX, op, ": ", name, " must be in [", lowest, ", ",
                    INT32_MAX, "], got ", v);
  }
  return list;
}

int64_t check_input(const char* op, const Tensor& q) {
  check_code_type(op, "q", q.scalar_type());
  STD_TORCH_CHECK(q.dim() >= 3 && q.dim() <= 5, op,
                  ": q must have 3, 4 or 5 dimensions [N, C, *spatial], got shape ", shape_text(q));
  for (int64_t d = 1; d < q.dim(); ++d) {
    STD_TORCH_CHECK(q.size(d) > 0, op, ": q must not be empty outside of the batch, got shape ",
                    shape_text(q));
  }
  return q.dim() - 2;
}

PoolGeometry geometry_of(const Tensor& q) {
  PoolGeometry g{.batch = q.size(0),
                 .channels = q.size(1),
                 .in = {1, 1, 1},
                 .out = {1, 1, 1},
                 .adaptive = false,
                 .kernel = {1, 1, 1},
                 .stride = {1, 1, 1},
                 .padding = {0, 0, 0},
                 .dilation = {1, 1, 1}};
  const int64_t spatial = q.dim() - 2;
  for (int64_t d = 0; d < spatial; ++d) g.in[3 - spatial + d] = q.size(2 + d);
  return g;
}

std::vector<int64_t> output_sizes(const Tensor& q, const PoolGeometry& g) {
  std::vector<int64_t> sizes = sizes_of(q);
  const int64_t spatial = q.dim() - 2;
  for (int64_t d = 0; d < spatial; ++d) sizes[2 + d] = g.out[3 - spatial + d];
  return sizes;
}

// The window lists of a pool; torch's rule for the output size.
PoolGeometry check_windows(const char* op, const Tensor& q, const PoolLists& lists,
                           const std::vector<int64_t>& dilation) {
  const auto& [kernel_size, stride, padding, ceil_mode] = lists;
  const int64_t spatial = check_input(op, q);
  const std::vector<int64_t> kernel = check_list(op, "kernel_size", kernel_size, spatial, 1);
  const std::vector<int64_t> step =
      stride.empty() ? kernel : check_list(op, "stride", stride, spatial, 1);
  check_list(op, "padding", padding, spatial, 0);
  check_list(op, "dilation", dilation, spatial, 1);
  PoolGeometry g = geometry_of(q);
  int64_t window = 1;
  for (int64_t i = 0; i < spatial; ++i) {
    const int64_t d = 3 - spatial + i;
    g.kernel[d] = kernel[i];
    g.stride[d] = step[i];
    g.padding[d] = padding[i];
    g.dilation[d] = dilation[i];
    const int64_t extent = dilation[i] * (kernel[i] - 1) + 1;
    STD_TORCH_CHECK(padding[i] <= extent / 2, op,
                    ": padding must be at most half of the window's extent ", extent, ", got ",
                    padding[i]);
    const int64_t room = g.in[d] + 2 * padding[i] - extent;
    STD_TORCH_CHECK(room >= 0 || (ceil_mode && room + step[i] - 1 >= 0), op,
                    ": the window's extent must be at most the padded input ",
                    g.in[d] + 2 * padding[i], ", got ", extent);
    g.out[d] = (room + (ceil_mode ? step[i] - 1 : 0)) / step[i] + 1;
    // The last window must start inside of the input or of the padding in front of it.
    if (ceil_mode && (g.out[d] - 1) * step[i] >= g.in[d] + padding[i]) --g.out[d];
    STD_TORCH_CHECK(window <= kMaxPoolWindow / kernel[i], op, ": a window must have at most ",
                    kMaxPoolWindow, " elements");
    window *= kernel[i];
  }
  return g;
}

PoolCall<AvgPoolArgs> check_mean(const char* op, const Tensor& q, const PoolGeometry& g,
                                 bool count_include_pad, int64_t divisor,
                                 const MeanNumbers& numbers) {
  const bool out_signed = check_code_type(op, "dtype", numbers.dtype);
  check_zero_point(op, "q_zero_point", q.scalar_type(), numbers.q_zero_point);
  check_clamped_grid(op, "zero_point", numbers.dtype, numbers.zero_point, numbers.qmin,
                     numbers.qmax);
  const float q_scale = check_scale(op, "q_scale", numbers.q_scale);
  const float scale = check_scale(op, "scale", numbers.scale);
  STD_TORCH_CHECK(is_finite(q_scale / scale), op,
                  ": q_scale / scale must be finite in float32, got ", q_scale, " / ", scale);
  PoolCall<AvgPoolArgs> call{
      as_channels_last(q), empty_channels_last(q, output_sizes(q, g), numbers.dtype), {}};
  call.args = {.q = static_cast<const uint8_t*>(call.input.const_data_ptr()),
               .out = static_cast<uint8_t*>(call.out.mutable_data_ptr()),
               .q_signed = q.scalar_type() == ScalarType::Char,
               .out_signed = out_signed,
               .geometry = g,
               .count_include_pad = count_include_pad,
               .divisor = divisor,
               .scale_ratio = q_scale / scale,
               .q_zero_point = static_cast<int32_t>(numbers.q_zero_point),
               .out_zero_point = static_cast<int32_t>(numbers.zero_point),
               .qmin = static_cast<int32_t>(numbers.qmin),
               .qmax = static_cast<int32_t>(numbers.qmax)};
  return call;
}

}  // namespace

PoolCall<MaxPoolArgs> check_max_pool(const Tensor& q, const PoolLists& lists,
                                     const std::vector<int64_t>& dilation) {
  const PoolGeometry g = check_windows("max_pool", q, lists, dilation);
  PoolCall<MaxPoolArgs> call{
      as_channels_last(q), empty_channels_last(q, output_sizes(q, g), q.scalar_type()), {}};
  call.args = {.q = static_cast<const uint8_t*>(call.input.const_data_ptr()),
               .out = static_cast<uint8_t*>(call.out.mutable_data_ptr()),
               .is_signed = q.scalar_type() == ScalarType::Char,
               .geometry = g};
  return call;
}

PoolCall<AvgPoolArgs> check_avg_pool(const Tensor& q, const PoolLists& lists,
                                     bool count_include_pad,
                                     std::optional<int64_t> divisor_override,
                                     const MeanNumbers& numbers) {
  STD_TORCH_CHECK(
      !divisor_override.has_value() || (*divisor_override > 0 && *divisor_override <= INT32_MAX),
      "avg_pool: divisor_override must be in [1, ", INT32_MAX, "], got ",
      divisor_override.value_or(0));
  const std::vector<int64_t> dilation(lists.kernel_size.size(), 1);
  const PoolGeometry g = check_windows("avg_pool", q, lists, dilation);
  return check_mean("avg_pool", q, g, count_include_pad, divisor_override.value_or(0), numbers);
}

PoolCall<AvgPoolArgs> check_adaptive_avg_pool(const Tensor& q,
                                              const std::vector<int64_t>& output_size,
                                              const MeanNumbers& numbers) {
  const int64_t spatial = check_input("adaptive_avg_pool", q);
  check_list("adaptive_avg_pool", "output_size", output_size, spatial, 1);
  PoolGeometry g = geometry_of(q);
  g.adaptive = true;
  int64_t window = 1;
  for (int64_t i = 0; i < spatial; ++i) {
    const int64_t d = 3 - spatial + i;
    g.out[d] = output_size[i];
    window *= g.in[d] / g.out[d] + 2;
    STD_TORCH_CHECK(window <= kMaxPoolWindow, "adaptive_avg_pool: a window must have at most ",
                    kMaxPoolWindow, " elements");
  }
  return check_mean("adaptive_avg_pool", q, g, false, 0, numbers);
}

namespace {

Tensor max_pool(const Tensor& q, const std::vector<int64_t>& kernel_size,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, bool ceil_mode) {
  const auto call = check_max_pool(q, {kernel_size, stride, padding, ceil_mode}, dilation);
  qk::max_pool(call.args, torch_threads());
  return call.out;
}

Tensor avg_pool(const Tensor& q, const std::vector<int64_t>& kernel_size,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override,
                double q_scale, int64_t q_zero_point, double scale, int64_t zero_point,
                int64_t qmin, int64_t qmax, ScalarType dtype) {
  const auto call = check_avg_pool(q, {kernel_size, stride, padding, ceil_mode}, count_include_pad,
                                   divisor_override,
                                   {q_scale, q_zero_point, scale, zero_point, qmin, qmax, dtype});
  qk::avg_pool(call.args, torch_threads());
  return call.out;
}

Tensor adaptive_avg_pool(const Tensor& q, const std::vector<int64_t>& output_size, double q_scale,
                         int64_t q_zero_point, double scale, int64_t zero_point, int64_t qmin,
                         int64_t qmax, ScalarType dtype) {
  const auto call = check_adaptive_avg_pool(
      q, output_size, {q_scale, q_zero_point, scale, zero_point, qmin, qmax, dtype});
  qk::avg_pool(call.args, torch_threads());
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&max_pool));
  m.impl("avg_pool", TORCH_BOX(&avg_pool));
  m.impl("adaptive_avg_pool", TORCH_BOX(&adaptive_avg_pool));
}

}  // namespace qk::seam
