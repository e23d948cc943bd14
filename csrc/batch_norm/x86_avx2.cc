#include "csrc/base/x86_avx2.h"

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/fake_quant/fake_quant.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

#include "csrc/batch_norm/x86_batch_norm.h"

}  // namespace

bool norm_statistics_avx2(const StatisticsRun& run) { return statistics_run<Vec>(run); }
void norm_fake_quant_avx2(const NormFakeQuantRun& run) { norm_fake_quant_any<Vec>(run); }
void norm_backward_avx2(const NormBackwardRun& run) { norm_backward_any<Vec>(run); }

}  // namespace qk
QK_TARGET_END
