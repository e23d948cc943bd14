// AVX-VNNI: the stages of winograd.h, with one instruction for a dot product.
#include <immintrin.h>

#include "csrc/base/integers.h"
#include "csrc/base/target.h"
#include "csrc/conv/winograd.h"

QK_TARGET_BEGIN(QK_ISA_AVXVNNI)
namespace qk {
namespace {

#include "csrc/base/x86_avxvnni.h"

#include "csrc/gemm/x86_driver.h"

#include "csrc/gemm/x86_avx2_epilogue.h"
#include "csrc/gemm/x86_ymm_store.h"

#include "csrc/conv/x86_winograd_transforms.h"

#include "csrc/conv/x86_winograd_ymm.h"

struct AvxVnniDot {
  QK_INLINE void run(__m256i& acc, __m256i a, __m256i b) { dot_words(acc, a, b); }
};

}  // namespace

void winograd_avxvnni(const WinogradBlock& b) { run_winograd<AvxVnniDot>(b); }

}  // namespace qk
QK_TARGET_END
