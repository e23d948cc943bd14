#include "csrc/base/x86_avx2.h"

#include "csrc/observe/observe.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

#include "csrc/observe/x86_minmax.h"

}  // namespace

bool minmax_f32_avx2(const MinMaxRun& run) { return minmax_any<Vec, float>(run); }
bool minmax_bf16_avx2(const MinMaxRun& run) { return minmax_any<Vec, BFloat16>(run); }
bool minmax_f16_avx2(const MinMaxRun& run) { return minmax_any<Vec, Float16>(run); }

}  // namespace qk
QK_TARGET_END
