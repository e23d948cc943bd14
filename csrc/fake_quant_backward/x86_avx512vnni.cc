#include "csrc/base/x86_avx512.h"

#include "csrc/fake_quant_backward/backward.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

#include "csrc/fake_quant_backward/x86_backward.h"

}  // namespace

void fake_quant_backward_f32_avx512vnni(const FakeQuantBackwardRun& run) {
  backward_any<Vec, float>(run);
}
void fake_quant_backward_bf16_avx512vnni(const FakeQuantBackwardRun& run) {
  backward_any<Vec, BFloat16>(run);
}
void fake_quant_backward_f16_avx512vnni(const FakeQuantBackwardRun& run) {
  backward_any<Vec, Float16>(run);
}

}  // namespace qk
QK_TARGET_END
