// 16 output channels at a time. Popcounts of nibbles by vpshufb; vpsadbw adds the bytes of a word.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/binary/binary.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

QK_INLINE __m256i popcount(__m256i v) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2,
                                         1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(v, low));
  const __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
  return _mm256_sad_epu8(_mm256_add_epi8(a, b), _mm256_setzero_si256());
}

}  // namespace

void xnor_avx2(const BinarySegment* segments, int64_t count, const uint64_t* weight,
               int32_t* ones) {
  for (int64_t first = 0; first < kBinaryBlock; first += 16) {
    __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    for (int64_t s = 0; s < count; ++s) {
      const auto* w =
          reinterpret_cast<const __m256i*>(weight + segments[s].first * kBinaryBlock + first);
      const uint64_t* a = segments[s].input;
      for (const uint64_t* end = a + segments[s].words; a < end; ++a, w += kBinaryBlock / 4) {
        const __m256i v = _mm256_set1_epi64x(static_cast<int64_t>(*a));
        sum0 = _mm256_add_epi64(sum0, popcount(_mm256_xor_si256(v, _mm256_loadu_si256(w))));
        sum1 = _mm256_add_epi64(sum1, popcount(_mm256_xor_si256(v, _mm256_loadu_si256(w + 1))));
        sum2 = _mm256_add_epi64(sum2, popcount(_mm256_xor_si256(v, _mm256_loadu_si256(w + 2))));
        sum3 = _mm256_add_epi64(sum3, popcount(_mm256_xor_si256(v, _mm256_loadu_si256(w + 3))));
      }
    }
    alignas(32) int64_t lanes[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum0);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 4), sum1);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 8), sum2);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 12), sum3);
    for (int64_t c = 0; c < 16; ++c) ones[first + c] = static_cast<int32_t>(lanes[c]);
  }
}

}  // namespace qk
QK_TARGET_END
