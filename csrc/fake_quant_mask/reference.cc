// Normative: the formulas of mask.h, one element at a time.
#include "csrc/fake_quant_mask/mask.h"

namespace qk {

bool fake_quant_mask_f32_scalar(const FakeQuantMaskRun& run) {
  return mask_elements<float>(run, 0);
}
bool fake_quant_mask_bf16_scalar(const FakeQuantMaskRun& run) {
  return mask_elements<BFloat16>(run, 0);
}
bool fake_quant_mask_f16_scalar(const FakeQuantMaskRun& run) {
  return mask_elements<Float16>(run, 0);
}
void mask_backward_32_scalar(const MaskBackwardRun& run) { pass_elements<uint32_t>(run, 0); }
void mask_backward_16_scalar(const MaskBackwardRun& run) { pass_elements<uint16_t>(run, 0); }

}  // namespace qk
