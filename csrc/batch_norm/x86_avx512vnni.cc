#include "csrc/base/x86_avx512.h"

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/fake_quant/fake_quant.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

#include "csrc/batch_norm/x86_batch_norm.h"

}  // namespace

bool norm_statistics_avx512vnni(const StatisticsRun& run) { return statistics_run<Vec>(run); }
void norm_fake_quant_avx512vnni(const NormFakeQuantRun& run) { norm_fake_quant_any<Vec>(run); }
void norm_backward_avx512vnni(const NormBackwardRun& run) { norm_backward_any<Vec>(run); }

}  // namespace qk
QK_TARGET_END
