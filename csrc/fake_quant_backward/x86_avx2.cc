#include "csrc/base/x86_avx2.h"

#include "csrc/fake_quant_backward/backward.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

#include "csrc/fake_quant_backward/x86_backward.h"

}  // namespace

void fake_quant_backward_f32_avx2(const FakeQuantBackwardRun& run) {
  backward_any<Vec, float>(run);
}
void fake_quant_backward_bf16_avx2(const FakeQuantBackwardRun& run) {
  backward_any<Vec, BFloat16>(run);
}
void fake_quant_backward_f16_avx2(const FakeQuantBackwardRun& run) {
  backward_any<Vec, Float16>(run);
}

}  // namespace qk
QK_TARGET_END
