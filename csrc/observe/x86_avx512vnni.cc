#include "csrc/base/x86_avx512.h"

#include "csrc/observe/observe.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

#include "csrc/observe/x86_minmax.h"

}  // namespace

bool minmax_f32_avx512vnni(const MinMaxRun& run) { return minmax_any<Vec, float>(run); }
bool minmax_bf16_avx512vnni(const MinMaxRun& run) { return minmax_any<Vec, BFloat16>(run); }
bool minmax_f16_avx512vnni(const MinMaxRun& run) { return minmax_any<Vec, Float16>(run); }

}  // namespace qk
QK_TARGET_END
