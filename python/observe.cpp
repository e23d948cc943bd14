#include "python/observe.h"

#include <string>
#include <tuple>

#include "csrc/fake_quant/fake_quant.h"

namespace qk::seam {
Tensor dense(const Tensor& x) { return is_dense(x) ? x : torch::stable::contiguous(x); }

namespace {

std::tuple<Tensor, Tensor, Tensor> observe_minmax(const Tensor& input,
                                                  std::optional<int64_t> axis) {
  const char* op = "observe_minmax";
  const FloatType type = check_float_type(op, "x", input);
  axis = check_axis(op, input, axis);
  Tensor x = dense(input);
  const int64_t channels = axis.has_value() ? x.size(*axis) : 1;
  Tensor low = empty_on_cpu({channels}, ScalarType::Float);
  Tensor high = empty_on_cpu({channels}, ScalarType::Float);
  Tensor non_finite = empty_on_cpu({2}, ScalarType::Long);
  const GridLayout grid = plan_grid(x, &x, axis, {});
  Tensor workspace = empty_on_cpu({minmax_workspace(grid)}, ScalarType::Float);
  const MinMaxArgs args{.x = x.const_data_ptr(),
                        .type = type,
                        .grid = grid,
                        .channels = channels,
                        .low = low.mutable_data_ptr<float>(),
                        .high = high.mutable_data_ptr<float>(),
                        .workspace = workspace.mutable_data_ptr<float>()};
  const NonFinite found = minmax(args, torch_threads()) ? NonFinite{} : finite_minmax(args);
  non_finite.mutable_data_ptr<int64_t>()[0] = found.nans;
  non_finite.mutable_data_ptr<int64_t>()[1] = found.infinities;
  return {low, high, non_finite};
}

}  // namespace

ObserverCall check_observer(const char* op, const Tensor& x, const Observer& observer,
                            Tensor* out) {
  const FloatType type = check_float_type(op, "x", x);
  const std::optional<int64_t> axis = check_axis(op, x, observer.axis);
  const int64_t channels = axis.has_value() ? x.size(*axis) : 1;
  STD_TORCH_CHECK(observer.qmin < observer.qmax, op, ": qmin must be below qmax, got qmin ",
                  observer.qmin, " and qmax ", observer.qmax);
  STD_TORCH_CHECK(observer.qmin >= -kFakeQuantLimit && observer.qmax <= kFakeQuantLimit, op,
                  ": qmin and qmax must be in [-2^21, 2^21], got qmin ", observer.qmin,
                  " and qmax ", observer.qmax);
  const float min_scale = check_scale(op, "min_scale", observer.min_scale);
  const float momentum = static_cast<float>(observer.momentum.value_or(1.0));
  STD_TORCH_CHECK(momentum > 0 && momentum <= 1, op, ": momentum must be in (0, 1], got ",
                  observer.momentum.value_or(1.0));
  const ObserverState state{
      .low = state_data<float>(op, "low", observer.low, x, ScalarType::Float, channels),
      .high = state_data<float>(op, "high", observer.high, x, ScalarType::Float, channels),
      .scale = state_data<float>(op, "scale", observer.scale, x, ScalarType::Float, channels),
      .zero_point =
          state_data<int32_t>(op, "zero_point", observer.zero_point, x, ScalarType::Int, channels)};
  int64_t* counts = nullptr;
  if (observer.non_finite.has_value()) {
    counts = state_data<int64_t>(op, "non_finite", *observer.non_finite, x, ScalarType::Long, 2);
  }
  if (out != nullptr) {
    check_out(op, x, *out, x.scalar_type(),
              {{"x", x},
               {"low", observer.low},
               {"high", observer.high},
               {"scale", observer.scale},
               {"zero_point", observer.zero_point}});
  }
  const ObserverRule rule{.rule = {.qmin = static_cast<int32_t>(observer.qmin),
                                   .qmax = static_cast<int32_t>(observer.qmax),
                                   .symmetric = observer.symmetric,
                                   .min_scale = min_scale},
                          .averages = observer.momentum.has_value(),
                          .momentum = momentum,
                          .floor = observer.limits.floor,
                          .ceiling = observer.limits.ceiling};
  return {out == nullptr ? dense(x) : x, type, axis, channels, rule, state, counts};
}

namespace {

bool run_observer(const char* op, const Tensor& input, const Observer& observer,
                  const std::string& source, Tensor* out) {
  ObserverCall call = check_observer(op, input, observer, out);
  Tensor& x = call.x;
  const int64_t channels = call.channels;
  int64_t* counts = call.counts;
  const GridLayout grid = plan_grid(out == nullptr ? x : *out, &x, call.axis, {});
  Tensor workspace =
      empty_on_cpu({observe_workspace(grid, channels) + 3 * channels}, ScalarType::Float);
  Tensor zero_points = empty_on_cpu({channels}, ScalarType::Int);
  float* scratch = workspace.mutable_data_ptr<float>();
  const Observed observed =
      qk::observe({.x = x.const_data_ptr(),
                   .y = out == nullptr ? nullptr : out->mutable_data_ptr(),
                   .type = call.type,
                   .grid = grid,
                   .channels = channels,
                   .rule = call.rule.rule,
                   .averages = call.rule.averages,
                   .momentum = call.rule.momentum,
                   .ignore_non_finite = counts != nullptr,
                   .floor = call.rule.floor,
                   .ceiling = call.rule.ceiling,
                   .state = call.state,
                   .next = {.low = scratch,
                            .high = scratch + channels,
                            .scale = scratch + 2 * channels,
                            .zero_point = zero_points.mutable_data_ptr<int32_t>()},
                   .workspace = scratch + 3 * channels},
                  torch_threads());
  const auto& [nans, infinities] = observed.non_finite;
  if (counts != nullptr) {
    counts[0] += nans;
    counts[1] += infinities;
  } else {
    STD_TORCH_CHECK(nans + infinities == 0, op, ": x (", source, ") must be finite, got ", nans,
                    " NaN and ", infinities, " infinite values among ", x.numel(),
                    "; no grid can be chosen from it");
  }
  return observed.clipped;
}

void observe(const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& scale,
             const Tensor& zero_point, const std::optional<Tensor>& non_finite,
             std::optional<int64_t> axis, int64_t qmin, int64_t qmax, bool symmetric,
             double min_scale, std::optional<double> momentum, std::string source,
             std::optional<double> floor, std::optional<double> ceiling) {
  const Observer observer{low,        high,      scale,    zero_point,
                          non_finite, axis,      qmin,     qmax,
                          symmetric,  min_scale, momentum, check_limits("observe", floor, ceiling)};
  run_observer("observe", x, observer, source, nullptr);
}

Tensor observe_fake_quant_out(const Tensor& x, const Tensor& low, const Tensor& high,
                              const Tensor& scale, const Tensor& zero_point,
                              const std::optional<Tensor>& non_finite, std::optional<int64_t> axis,
                              int64_t qmin, int64_t qmax, bool symmetric, double min_scale,
                              std::optional<double> momentum, std::string source, Tensor out) {
  Tensor clipped = empty_on_cpu({}, ScalarType::Bool);
  *clipped.mutable_data_ptr<bool>() = run_observer(
      "observe_fake_quant", x,
      {low, high, scale, zero_point, non_finite, axis, qmin, qmax, symmetric, min_scale, momentum},
      source, &out);
  return clipped;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("observe_minmax", TORCH_BOX(&observe_minmax));
  m.impl("observe", TORCH_BOX(&observe));
  m.impl("observe_fake_quant_out", TORCH_BOX(&observe_fake_quant_out));
}

}  // namespace qk::seam
