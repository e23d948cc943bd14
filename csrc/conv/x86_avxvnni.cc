// The depthwise strip with 256-bit dot products: blocks of 32 or 16 channels. See depthwise.h.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/conv/depthwise.h"

QK_TARGET_BEGIN(QK_ISA_AVXVNNI)
namespace qk {
namespace {

#include "csrc/base/x86_avxvnni.h"

#include "csrc/conv/x86_depthwise_tile.h"
#include "csrc/conv/x86_depthwise_ymm.h"

struct AvxVnni : Ymm {
  static constexpr int kVectorBytes = 32, kDwordRows = 4;
  static constexpr bool kForGroups = true, kForChannels = true, kHoldsTaps = true;
  using Weights = __m256i;

  QK_INLINE __m256i load_activations(const uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  QK_INLINE __m256i load_weights(const int8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  QK_INLINE void store_dwords(uint8_t* p, __m256i quad) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), quad);
  }
  QK_INLINE void dot(__m256i& acc, __m256i a, __m256i w) { dot_bytes(acc, a, w); }
};

}  // namespace

void depthwise_avxvnni(const DepthwiseStrip& s) {
  if (s.vectors == 4) {
    block<AvxVnni, 4>(s);
  } else {
    block<AvxVnni, 2>(s);
  }
}

}  // namespace qk
QK_TARGET_END
