#include "csrc/base/x86_avx2.h"

#include "csrc/quantize/quantize.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

#include "csrc/quantize/x86_quantize.h"

}  // namespace

void quantize_f32_avx2(const QuantizeRun& run) { quantize_any<Vec, float>(run); }
void quantize_bf16_avx2(const QuantizeRun& run) { quantize_any<Vec, BFloat16>(run); }
void quantize_f16_avx2(const QuantizeRun& run) { quantize_any<Vec, Float16>(run); }
void dequantize_f32_avx2(const DequantizeRun& run) { dequantize_any<Vec, float>(run); }
void dequantize_bf16_avx2(const DequantizeRun& run) { dequantize_any<Vec, BFloat16>(run); }
void dequantize_f16_avx2(const DequantizeRun& run) { dequantize_any<Vec, Float16>(run); }

}  // namespace qk
QK_TARGET_END
