// A 256-entry byte table in four registers: two vpermi2b and a blend on the top bit look up 64
// bytes.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/gemm/igemm.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VBMI)
namespace qk {

void igemm_lookup_avx512vbmi(uint8_t* q, int64_t n, const uint8_t* table) {
  const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64);
  const __m512i t2 = _mm512_loadu_si512(table + 128), t3 = _mm512_loadu_si512(table + 192);
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 mask = n - i >= 64 ? ~__mmask64{0} : (1ull << (n - i)) - 1ull;
    const __m512i index = _mm512_maskz_loadu_epi8(mask, q + i);
    const __m512i low = _mm512_permutex2var_epi8(t0, index, t1);
    const __m512i high = _mm512_permutex2var_epi8(t2, index, t3);
    const __m512i value = _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
    _mm512_mask_storeu_epi8(q + i, mask, value);
  }
}

}  // namespace qk
QK_TARGET_END
