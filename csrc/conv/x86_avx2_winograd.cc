// AVX2: the stages of winograd.h. Trick: products of bytes are only about 1.5 times as fast here as
//   those of int16 (gemm/x86_avx2_steps.cc), so a quarter of them saves more than where bytes have
//   dot products of their own.
#include <immintrin.h>

#include "csrc/base/integers.h"
#include "csrc/base/target.h"
#include "csrc/conv/winograd.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

#include "csrc/gemm/x86_driver.h"

#include "csrc/gemm/x86_avx2_epilogue.h"
#include "csrc/gemm/x86_ymm_store.h"

#include "csrc/conv/x86_winograd_transforms.h"

#include "csrc/conv/x86_winograd_ymm.h"

struct Avx2Dot {
  QK_INLINE void run(__m256i& acc, __m256i a, __m256i b) {
    __m256i products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(acc), "=&x"(products)
            : "x"(a), "x"(b));
  }
};

}  // namespace

void winograd_avx2(const WinogradBlock& b) { run_winograd<Avx2Dot>(b); }

}  // namespace qk
QK_TARGET_END
