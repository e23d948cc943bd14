// Normative: the formulas of dorefa.h, one element at a time.
#include "csrc/dorefa/dorefa.h"

namespace qk {
namespace {

template <typename T>
void dorefa_weight_run(const DorefaWeightRun& run) {
  for (int64_t i = 0; i < run.n; ++i) dorefa_weight_element<T>(run, i);
}

template <typename T>
void dorefa_backward_run(const DorefaBackwardRun& run) {
  float lanes[kSumLanes] = {};
  for (int64_t i = 0; i < run.n; ++i) {
    dorefa_backward_element<T>(run, i, lanes + i % kSumLanes, 0.0f);
  }
  *run.sum = sum_lanes(lanes);
}

template <typename T>
void dorefa_gradient_run(const DorefaGradientRun& run) {
  for (int64_t i = 0; i < run.n; ++i) dorefa_gradient_element<T>(run, i);
}

}  // namespace

void dorefa_weight_f32_scalar(const DorefaWeightRun& run) { dorefa_weight_run<float>(run); }
void dorefa_backward_f32_scalar(const DorefaBackwardRun& run) { dorefa_backward_run<float>(run); }
void dorefa_gradient_f32_scalar(const DorefaGradientRun& run) { dorefa_gradient_run<float>(run); }
void dorefa_weight_bf16_scalar(const DorefaWeightRun& run) { dorefa_weight_run<BFloat16>(run); }
void dorefa_backward_bf16_scalar(const DorefaBackwardRun& run) {
  dorefa_backward_run<BFloat16>(run);
}
void dorefa_gradient_bf16_scalar(const DorefaGradientRun& run) {
  dorefa_gradient_run<BFloat16>(run);
}
void dorefa_weight_f16_scalar(const DorefaWeightRun& run) { dorefa_weight_run<Float16>(run); }
void dorefa_backward_f16_scalar(const DorefaBackwardRun& run) { dorefa_backward_run<Float16>(run); }
void dorefa_gradient_f16_scalar(const DorefaGradientRun& run) { dorefa_gradient_run<Float16>(run); }

}  // namespace qk
