#include "csrc/base/x86_avx2.h"

#include "csrc/fake_quant/fake_quant.h"
#include "csrc/fake_quant_mask/mask.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

#include "csrc/fake_quant_mask/x86_mask.h"

}  // namespace

bool fake_quant_mask_f32_avx2(const FakeQuantMaskRun& run) { return mask_any<Vec, float>(run); }
bool fake_quant_mask_bf16_avx2(const FakeQuantMaskRun& run) { return mask_any<Vec, BFloat16>(run); }
bool fake_quant_mask_f16_avx2(const FakeQuantMaskRun& run) { return mask_any<Vec, Float16>(run); }
void mask_backward_32_avx2(const MaskBackwardRun& run) { pass_any<Vec, uint32_t>(run); }
void mask_backward_16_avx2(const MaskBackwardRun& run) { pass_any<Vec, uint16_t>(run); }

}  // namespace qk
QK_TARGET_END
