// The depthwise strip with AVX2, exact: blocks of 32 or 16 channels. See depthwise.h.
// Trick: vpmaddubsw would saturate, so the four interleaved rows are split into even and odd bytes
// as int16 (one `and`, one shift, shared by both output rows) and multiplied by int16 weights with
// vpmaddwd, which is exact.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/conv/depthwise.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

#include "csrc/conv/x86_depthwise_tile.h"
#include "csrc/conv/x86_depthwise_ymm.h"

struct Avx2 : Ymm {
  static constexpr int kWeightBytes = 64;
  static constexpr bool kHoldsTaps = false;
  struct Pair {
    __m256i even, odd;
  };
  using Weights = Pair;

  QK_INLINE Pair load_activations(const uint8_t* p) {
    const __m256i rows = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_and_si256(rows, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(rows, 8)};
  }
  QK_INLINE Pair load_weights(const int8_t* p) {
    const auto* w = reinterpret_cast<const __m256i*>(p);
    return {_mm256_load_si256(w), _mm256_load_si256(w + 1)};
  }
  QK_INLINE void dot(__m256i& acc, Pair a, Pair w) {
    acc = _mm256_add_epi32(
        acc, _mm256_add_epi32(_mm256_madd_epi16(a.even, w.even), _mm256_madd_epi16(a.odd, w.odd)));
  }
};

}  // namespace

void depthwise_avx2(const DepthwiseStrip& s) {
  if (s.vectors == 4) {
    block<Avx2, 4>(s);
  } else {
    block<Avx2, 2>(s);
  }
}

}  // namespace qk
QK_TARGET_END
