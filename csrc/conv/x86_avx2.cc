// The depthwise strip with AVX2, exact: blocks of 32 or 16 channels. See depthwise.h.
// Trick: vpmaddubsw would saturate; vpmaddwd, the dot product of two int16, does not. A dword of a
// depthwise layer is two rows, widened when the scratch strip is filled. For narrow groups it is
// four channels, split into even and odd bytes as int16 (one `and`, one shift).
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/conv/depthwise.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

#include "csrc/conv/x86_depthwise_tile.h"
#include "csrc/conv/x86_depthwise_ymm.h"

// Channels of two rows, as int16.
template <int V>
struct WordRow;

template <>
struct WordRow<4> : Row256<4> {
  QK_INLINE void interleave(const Type (&r)[2], uint8_t* dst) {
    const Type low = _mm256_unpacklo_epi8(r[0], r[1]), high = _mm256_unpackhi_epi8(r[0], r[1]);
    const Type zero = _mm256_setzero_si256();
    auto* q = reinterpret_cast<__m256i*>(dst);
    _mm256_store_si256(q, _mm256_unpacklo_epi8(low, zero));
    _mm256_store_si256(q + 1, _mm256_unpackhi_epi8(low, zero));
    _mm256_store_si256(q + 2, _mm256_unpacklo_epi8(high, zero));
    _mm256_store_si256(q + 3, _mm256_unpackhi_epi8(high, zero));
  }
};

template <>
struct WordRow<2> : Row256<2> {
  QK_INLINE void interleave(const Type (&r)[2], uint8_t* dst) {
    auto* q = reinterpret_cast<__m256i*>(dst);
    _mm256_store_si256(q, _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(r[0], r[1])));
    _mm256_store_si256(q + 1, _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(r[0], r[1])));
  }
};

struct Avx2Channels : Ymm {
  static constexpr int kVectorBytes = 32, kDwordRows = 2, kPairColumns = 4;
  static constexpr bool kForGroups = false, kForChannels = true, kHoldsTaps = false;
  static constexpr bool kUnrolls = true;
  using Weights = __m256i;
  template <int V>
  using Row = WordRow<V>;

  QK_INLINE __m256i load_activations(const uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  QK_INLINE __m256i load_weights(const int8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  QK_INLINE void dot(__m256i& acc, __m256i a, __m256i w) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, w));
  }
};

struct Avx2Groups : Ymm {
  static constexpr int kVectorBytes = 64, kDwordRows = 4;
  static constexpr bool kForGroups = true, kForChannels = false, kHoldsTaps = true;
  struct Pair {
    __m256i even, odd;
  };
  using Weights = Pair;

  QK_INLINE void store_dwords(uint8_t* p, __m256i quad) {
    auto* q = reinterpret_cast<__m256i*>(p);
    _mm256_store_si256(q, _mm256_and_si256(quad, _mm256_set1_epi16(0xff)));
    _mm256_store_si256(q + 1, _mm256_srli_epi16(quad, 8));
  }
  QK_INLINE Pair load_activations(const uint8_t* p) {
    const auto* quad = reinterpret_cast<const __m256i*>(p);
    return {_mm256_load_si256(quad), _mm256_load_si256(quad + 1)};
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

template <typename Kernel>
QK_INLINE void run(const DepthwiseStrip& s) {
  s.vectors == 4 ? block<Kernel, 4>(s) : block<Kernel, 2>(s);
}

}  // namespace

void depthwise_avx2(const DepthwiseStrip& s) {
  s.quads > 0 ? run<Avx2Groups>(s) : run<Avx2Channels>(s);
}

}  // namespace qk
QK_TARGET_END
