// Normative: the formulas of backward.h, one element at a time.
#include "csrc/fake_quant_backward/backward.h"

namespace qk {
namespace {

template <typename T>
void backward_row(const FakeQuantBackwardRun& run) {
  float lanes[2][kSumLanes] = {};
  for (int64_t i = 0; i < run.n; ++i) {
    if (run.columns != nullptr) {
      backward_element<T>(run, i, run.columns + i, run.columns + kGridBlock + i);
    } else if (run.partial != nullptr) {
      backward_element<T>(run, i, lanes[0] + i % kSumLanes, lanes[1] + i % kSumLanes);
    } else {
      backward_element<T>(run, i, nullptr, nullptr);
    }
  }
  if (run.partial == nullptr) return;
  for (int k = 0; k < 2; ++k) run.partial[k] = sum_lanes(lanes[k]);
}

template <typename T>
void backward_scalar(const FakeQuantBackwardRun& run) {
  backward_row<T>(run);
  if (run.rows == 1) return;
  FakeQuantBackwardRun second = run;
  second.grad = static_cast<const T*>(run.grad) + run.out_step;
  second.x = static_cast<const T*>(run.x) + run.x_step;
  second.out = static_cast<T*>(run.out) + run.out_step;
  backward_row<T>(second);
}

}  // namespace

void fake_quant_backward_f32_scalar(const FakeQuantBackwardRun& run) {
  backward_scalar<float>(run);
}
void fake_quant_backward_bf16_scalar(const FakeQuantBackwardRun& run) {
  backward_scalar<BFloat16>(run);
}
void fake_quant_backward_f16_scalar(const FakeQuantBackwardRun& run) {
  backward_scalar<Float16>(run);
}

}  // namespace qk
