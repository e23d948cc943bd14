// lookup with VBMI: the table is 4 registers; two byte permutes read its halves, the top bit of the
// code chooses.
#include "csrc/base/x86_avx512.h"
#include "csrc/pointwise/pointwise.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VBMI)
namespace qk {
namespace {

struct PermuteTable {
  __m512i part[4];
};

QK_INLINE __m512i permute_lookup(const PermuteTable& t, __m512i q) {
  const __m512i low = _mm512_permutex2var_epi8(t.part[0], q, t.part[1]);
  const __m512i high = _mm512_permutex2var_epi8(t.part[2], q, t.part[3]);
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(q), low, high);
}

}  // namespace

void lookup_avx512vbmi(const LookupRows& run) {
  PermuteTable table;
  for (int k = 0; k < 4; ++k) table.part[k] = _mm512_loadu_si512(run.table + 64 * k);
  for (int64_t row = 0; row < run.rows; ++row) {
    const uint8_t* q = run.q + row * run.q_stride;
    uint8_t* out = run.out + row * run.out_stride;
    int64_t i = 0;
    for (; i + 128 <= run.n; i += 128) {
      const __m512i first = permute_lookup(table, _mm512_loadu_si512(q + i));
      const __m512i second = permute_lookup(table, _mm512_loadu_si512(q + i + 64));
      _mm512_storeu_si512(out + i, first);
      _mm512_storeu_si512(out + i + 64, second);
    }
    for (; i < run.n; i += 64) {
      const int64_t left = run.n - i;
      const __mmask64 m = left >= 64 ? ~__mmask64{0} : (1ull << left) - 1;
      _mm512_mask_storeu_epi8(out + i, m, permute_lookup(table, _mm512_maskz_loadu_epi8(m, q + i)));
    }
  }
}

}  // namespace qk
QK_TARGET_END
