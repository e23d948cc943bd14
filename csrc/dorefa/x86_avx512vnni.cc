#include "csrc/base/x86_avx512.h"

#include "csrc/dorefa/dorefa.h"
#include "csrc/fake_quant/fake_quant.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

#include "csrc/dorefa/x86_dorefa.h"

}  // namespace

void dorefa_weight_f32_avx512vnni(const DorefaWeightRun& run) {
  dorefa_weight_run<Vec, float>(run);
}
void dorefa_backward_f32_avx512vnni(const DorefaBackwardRun& run) {
  dorefa_backward_run<Vec, float>(run);
}
void dorefa_gradient_f32_avx512vnni(const DorefaGradientRun& run) {
  dorefa_gradient_run<Vec, float>(run);
}
void dorefa_weight_bf16_avx512vnni(const DorefaWeightRun& run) {
  dorefa_weight_run<Vec, BFloat16>(run);
}
void dorefa_backward_bf16_avx512vnni(const DorefaBackwardRun& run) {
  dorefa_backward_run<Vec, BFloat16>(run);
}
void dorefa_gradient_bf16_avx512vnni(const DorefaGradientRun& run) {
  dorefa_gradient_run<Vec, BFloat16>(run);
}
void dorefa_weight_f16_avx512vnni(const DorefaWeightRun& run) {
  dorefa_weight_run<Vec, Float16>(run);
}
void dorefa_backward_f16_avx512vnni(const DorefaBackwardRun& run) {
  dorefa_backward_run<Vec, Float16>(run);
}
void dorefa_gradient_f16_avx512vnni(const DorefaGradientRun& run) {
  dorefa_gradient_run<Vec, Float16>(run);
}

}  // namespace qk
QK_TARGET_END
