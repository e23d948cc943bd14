// Two and three channels: 16 pixels a step, three shuffles for each 16 bytes of output of three.
// Eight channels and more: blocks of 8 channels x 16 pixels, transposed by three rounds of
// unpacking; what is left over is done by blocks that overlap others. Others in order.
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

constexpr int64_t kChannels = 8, kPixels = 16;  // of a block
constexpr int64_t kStrip = 64;                  // channels whose lines stay in L1

// A round pairs row k with row k + 4: after three of them a row holds 8 channels of two pixels.
QK_INLINE void unpack_rows(const __m128i (&in)[kChannels], __m128i (&out)[kChannels]) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    out[2 * k] = _mm_unpacklo_epi8(in[k], in[k + 4]);
    out[2 * k + 1] = _mm_unpackhi_epi8(in[k], in[k + 4]);
  }
}

QK_INLINE void transpose_block(const uint8_t* in, int64_t in_stride, uint8_t* out,
                               int64_t out_stride) {
  __m128i a[kChannels], b[kChannels];
#pragma GCC unroll 8
  for (int c = 0; c < kChannels; ++c) a[c] = load16(in + c * in_stride);
  unpack_rows(a, b);
  unpack_rows(b, a);
  unpack_rows(a, b);
#pragma GCC unroll 8
  for (int k = 0; k < kChannels; ++k, out += 2 * out_stride) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), b[k]);
    _mm_storeh_pi(reinterpret_cast<__m64*>(out + out_stride), _mm_castsi128_ps(b[k]));
  }
}

// The start of a block that begins at `at`, or earlier so that it ends by `end`.
QK_INLINE int64_t block_at(int64_t at, int64_t block, int64_t end) {
  return at + block <= end ? at : end - block;
}

// At least a block of each.
QK_INLINE void interleave_blocks(const InterleaveRun& run) {
  for (int64_t strip = 0; strip < run.channels; strip += kStrip) {
    const int64_t strip_end = strip + kStrip < run.channels ? strip + kStrip : run.channels;
    for (int64_t pixel = 0; pixel < run.n; pixel += kPixels) {
      const int64_t i = block_at(pixel, kPixels, run.n);
      for (int64_t channel = strip; channel < strip_end; channel += kChannels) {
        const int64_t c = block_at(channel, kChannels, run.channels);
        transpose_block(run.planes + c * run.plane_stride + i, run.plane_stride,
                        run.out + i * run.pixel_stride + c, run.pixel_stride);
      }
    }
  }
}

}  // namespace

void interleave_avx2(const InterleaveRun& run) {
  if (run.channels == 2 && run.is_dense() && run.n >= 16) return interleave2(run);
  if (run.channels == 3 && run.is_dense()) return interleave3(run);
  if (run.channels >= kChannels && run.n >= kPixels) return interleave_blocks(run);
  interleave_scalar(run);
}

}  // namespace qk
QK_TARGET_END
