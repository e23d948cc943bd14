#include "python/histogram.h"

namespace qk::seam {

HistogramCall check_histogram(const Tensor& x, const Tensor& batch_low, const Tensor& batch_high,
                              const Tensor& low, const Tensor& high, const Tensor& histogram) {
  constexpr const char* op = "observe_histogram";
  const FloatType type = check_float_type(op, "x", x);
  STD_TORCH_CHECK(
      histogram.dim() == 1 && histogram.numel() >= 2 && histogram.numel() <= kMaxHistogramBins, op,
      ": histogram must have one dimension of 2 to ", kMaxHistogramBins, " bins, got shape ",
      shape_text(histogram));
  const int64_t bins = histogram.numel();
  const auto end_of = [&](const char* name, const Tensor& t) {
    return state_data<float>(op, name, t, x, ScalarType::Float, 1);
  };
  return {.x = dense(x),
          .type = type,
          .batch_low = end_of("batch_low", batch_low),
          .batch_high = end_of("batch_high", batch_high),
          .low = end_of("low", low),
          .high = end_of("high", high),
          .histogram = state_data<float>(op, "histogram", histogram, x, ScalarType::Float, bins),
          .bins = bins};
}

namespace {

void observe_histogram(const Tensor& x, const Tensor& batch_low, const Tensor& batch_high,
                       const Tensor& low, const Tensor& high, const Tensor& histogram) {
  const HistogramCall call = check_histogram(x, batch_low, batch_high, low, high, histogram);
  Tensor workspace =
      empty_on_cpu({histogram_workspace(call.x.numel(), call.bins)}, ScalarType::Byte);
  qk::observe_histogram({.x = call.x.const_data_ptr(),
                         .type = call.type,
                         .n = call.x.numel(),
                         .batch_low = *call.batch_low,
                         .batch_high = *call.batch_high,
                         .low = call.low,
                         .high = call.high,
                         .histogram = call.histogram,
                         .bins = call.bins,
                         .workspace = workspace.mutable_data_ptr()},
                        torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("observe_histogram", TORCH_BOX(&observe_histogram));
}

}  // namespace qk::seam
