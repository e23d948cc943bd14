#include "csrc/base/x86_avx512.h"

#include "csrc/fake_quant/fake_quant.h"
#include "csrc/fake_quant_mask/mask.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

#include "csrc/fake_quant_mask/x86_mask.h"

}  // namespace

bool fake_quant_mask_f32_avx512vnni(const FakeQuantMaskRun& run) {
  return mask_any<Vec, float>(run);
}
bool fake_quant_mask_bf16_avx512vnni(const FakeQuantMaskRun& run) {
  return mask_any<Vec, BFloat16>(run);
}
bool fake_quant_mask_f16_avx512vnni(const FakeQuantMaskRun& run) {
  return mask_any<Vec, Float16>(run);
}
void mask_backward_32_avx512vnni(const MaskBackwardRun& run) { pass_any<Vec, uint32_t>(run); }
void mask_backward_16_avx512vnni(const MaskBackwardRun& run) { pass_any<Vec, uint16_t>(run); }

}  // namespace qk
QK_TARGET_END
