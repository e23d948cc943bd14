// Two and three channels: 16 pixels a step, three shuffles for each 16 bytes of output of three.
// Others in order.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/image/image.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

// Byte i of the k-th 16 bytes of output, if it comes from plane c: its index in the plane, else -1.
struct Shuffle {
  alignas(16) int8_t index[3][3][16];

  constexpr Shuffle() : index() {
    for (int k = 0; k < 3; ++k) {
      for (int c = 0; c < 3; ++c) {
        for (int i = 0; i < 16; ++i) {
          const int at = 16 * k + i;
          index[k][c][i] = static_cast<int8_t>(at % 3 == c ? at / 3 : -1);
        }
      }
    }
  }
};
constexpr Shuffle kShuffle;

QK_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

QK_INLINE void store16(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }

// At least 16 pixels; the last step may do some again.
QK_INLINE void interleave2(const InterleaveRun& run) {
  for (int64_t i = 0; i < run.n; i += 16) {
    const int64_t at = i + 16 <= run.n ? i : run.n - 16;
    const __m128i a = load16(run.planes + at), b = load16(run.planes + run.plane_stride + at);
    store16(run.out + 2 * at, _mm_unpacklo_epi8(a, b));
    store16(run.out + 2 * at + 16, _mm_unpackhi_epi8(a, b));
  }
}

QK_INLINE void interleave3(const InterleaveRun& run) {
  __m128i shuffle[3][3];
  for (int k = 0; k < 3; ++k) {
    for (int c = 0; c < 3; ++c) shuffle[k][c] = load16(kShuffle.index[k][c]);
  }
  const uint8_t *a = run.planes, *b = a + run.plane_stride, *c = b + run.plane_stride;
  int64_t i = 0;
  for (; i + 16 <= run.n; i += 16) {
    const __m128i va = load16(a + i), vb = load16(b + i), vc = load16(c + i);
    for (int k = 0; k < 3; ++k) {
      const __m128i ab =
          _mm_or_si128(_mm_shuffle_epi8(va, shuffle[k][0]), _mm_shuffle_epi8(vb, shuffle[k][1]));
      const __m128i abc = _mm_or_si128(ab, _mm_shuffle_epi8(vc, shuffle[k][2]));
      store16(run.out + 3 * i + 16 * k, abc);
    }
  }
  for (; i < run.n; ++i) {
    run.out[3 * i] = a[i];
    run.out[3 * i + 1] = b[i];
    run.out[3 * i + 2] = c[i];
  }
}

}  // namespace

void interleave_avx2(const InterleaveRun& run) {
  if (run.channels == 2 && run.n >= 16) return interleave2(run);
  if (run.channels == 3) return interleave3(run);
  for (int64_t i = 0; i < run.n; ++i) {
    for (int64_t c = 0; c < run.channels; ++c) {
      run.out[i * run.channels + c] = run.planes[c * run.plane_stride + i];
    }
  }
}

}  // namespace qk
QK_TARGET_END
