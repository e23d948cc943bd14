// Three channels: 64 pixels a step, two byte permutes for each 64 bytes of output. Others as AVX2.
#include "csrc/base/x86_avx512.h"
#include "csrc/image/image.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VBMI)
namespace qk {
namespace {

// Byte i of the k-th 64 bytes of output: its index in the planes 0 and 1, one behind the other, or
// in plane 2, and which of the two.
struct Permute {
  alignas(64) uint8_t index[3][64];
  uint64_t last[3];

  constexpr Permute() : index(), last() {
    for (int k = 0; k < 3; ++k) {
      for (int i = 0; i < 64; ++i) {
        const int at = 64 * k + i;
        index[k][i] = static_cast<uint8_t>(at % 3 == 1 ? 64 + at / 3 : at / 3);
        if (at % 3 == 2) last[k] |= uint64_t{1} << i;
      }
    }
  }
};
constexpr Permute kPermute;

QK_INLINE __mmask64 lanes(int64_t n) {
  return n >= 64 ? ~__mmask64{0} : n <= 0 ? 0 : (__mmask64{1} << n) - 1;
}

QK_INLINE void interleave3(const InterleaveRun& run) {
  __m512i index[3];
  for (int k = 0; k < 3; ++k) index[k] = _mm512_load_si512(kPermute.index[k]);
  for (int64_t i = 0; i < run.n; i += 64) {
    const __mmask64 pixels = lanes(run.n - i);
    __m512i plane[3];
    for (int c = 0; c < 3; ++c) {
      plane[c] = _mm512_maskz_loadu_epi8(pixels, run.planes + c * run.plane_stride + i);
    }
    for (int k = 0; k < 3; ++k) {
      const __m512i two = _mm512_permutex2var_epi8(plane[0], index[k], plane[1]);
      const __m512i all = _mm512_mask_permutexvar_epi8(two, kPermute.last[k], index[k], plane[2]);
      _mm512_mask_storeu_epi8(run.out + 3 * i + 64 * k, lanes(3 * (run.n - i) - 64 * k), all);
    }
  }
}

}  // namespace

void interleave_avx512vbmi(const InterleaveRun& run) {
  run.channels == 3 && run.is_dense() ? interleave3(run) : interleave_avx2(run);
}

}  // namespace qk
QK_TARGET_END
