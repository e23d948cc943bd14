#include "csrc/base/x86_avx512.h"

#include "csrc/quantize/quantize.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

#include "csrc/quantize/x86_quantize.h"

}  // namespace

void quantize_f32_avx512vnni(const QuantizeRun& run) { quantize_any<Vec, float>(run); }
void quantize_bf16_avx512vnni(const QuantizeRun& run) { quantize_any<Vec, BFloat16>(run); }
void quantize_f16_avx512vnni(const QuantizeRun& run) { quantize_any<Vec, Float16>(run); }
void dequantize_f32_avx512vnni(const DequantizeRun& run) { dequantize_any<Vec, float>(run); }
void dequantize_bf16_avx512vnni(const DequantizeRun& run) { dequantize_any<Vec, BFloat16>(run); }
void dequantize_f16_avx512vnni(const DequantizeRun& run) { dequantize_any<Vec, Float16>(run); }

}  // namespace qk
QK_TARGET_END
