// 32 output channels at a time, one vpopcntq for eight words.
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns about its own _mm512_undefined_*() wherever an intrinsic is inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/binary/binary.h"

#define QK_ISA_AVX512VPOPCNTDQ \
  "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,prefer-vector-width=512"

QK_TARGET_BEGIN(QK_ISA_AVX512VPOPCNTDQ)
namespace qk {
namespace {

QK_INLINE __m512i xor_popcount(__m512i a, const uint64_t* w) {
  return _mm512_popcnt_epi64(_mm512_xor_si512(a, _mm512_loadu_si512(w)));
}

}  // namespace

void xnor_avx512vpopcntdq(const BinarySegment* segments, int64_t count, const uint64_t* weight,
                          int32_t* ones) {
  __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  for (int64_t s = 0; s < count; ++s) {
    const uint64_t* w = weight + segments[s].first * kBinaryBlock;
    const uint64_t* a = segments[s].input;
    for (const uint64_t* end = a + segments[s].words; a < end; ++a, w += kBinaryBlock) {
      const __m512i v = _mm512_set1_epi64(static_cast<int64_t>(*a));
      sum0 = _mm512_add_epi64(sum0, xor_popcount(v, w));
      sum1 = _mm512_add_epi64(sum1, xor_popcount(v, w + 8));
      sum2 = _mm512_add_epi64(sum2, xor_popcount(v, w + 16));
      sum3 = _mm512_add_epi64(sum3, xor_popcount(v, w + 24));
    }
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ones), _mm512_cvtepi64_epi32(sum0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ones + 8), _mm512_cvtepi64_epi32(sum1));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ones + 16), _mm512_cvtepi64_epi32(sum2));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ones + 24), _mm512_cvtepi64_epi32(sum3));
}

}  // namespace qk
QK_TARGET_END
