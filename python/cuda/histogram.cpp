#include "python/histogram.h"

#include "csrc/histogram/cuda.h"
#include "python/cuda/adapt.h"

namespace qk::seam {
namespace {

void observe_histogram(const Tensor& x, const Tensor& batch_low, const Tensor& batch_high,
                       const Tensor& low, const Tensor& high, const Tensor& histogram) {
  constexpr const char* op = "observe_histogram";
  const torch::stable::accelerator::DeviceGuard guard(guarded_device(op, x));
  const HistogramCall call = check_histogram(x, batch_low, batch_high, low, high, histogram);
  Tensor workspace = empty(x, {histogram_cuda_workspace(call.bins)}, ScalarType::Byte);
  check_launch(op, observe_histogram_cuda({.x = call.x.const_data_ptr(),
                                           .type = call.type,
                                           .n = call.x.numel(),
                                           .batch_low = call.batch_low,
                                           .batch_high = call.batch_high,
                                           .low = call.low,
                                           .high = call.high,
                                           .histogram = call.histogram,
                                           .bins = call.bins,
                                           .workspace = workspace.mutable_data_ptr()},
                                          current_stream(x)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("observe_histogram", TORCH_BOX(&observe_histogram));
}

}  // namespace qk::seam
