// 64 channels a vector, the last ones under a mask. Sums run in 16 bits and move to 32 bits before
// they can overflow; unpacking and packing inside 16-byte lanes undo each other.
#include "csrc/base/numerics.h"
#include "csrc/base/x86_avx512.h"
#include "csrc/pool/pool.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

// Codes that a 16-bit sum can take: 257 * 255 = 65535.
constexpr int kFlush = 257;

#include "csrc/pool/windows.h"

template <bool kSigned>
QK_INLINE __m512i max_codes(__m512i a, __m512i b) {
  return kSigned ? _mm512_max_epi8(a, b) : _mm512_max_epu8(a, b);
}

template <bool kSigned>
QK_INLINE void max_window(const PoolWindows& window) {
  const __m512i lowest = kSigned ? _mm512_set1_epi8(-128) : _mm512_setzero_si512();
  int64_t c = 0;
  for (; c + 256 <= window.channels; c += 256) {
    __m512i best[4] = {lowest, lowest, lowest, lowest};
    for_each_tap(window, window.base + c, [&](const uint8_t* tap) __attribute__((always_inline)) {
      for (int k = 0; k < 4; ++k) {
        best[k] = max_codes<kSigned>(best[k], _mm512_loadu_si512(tap + 64 * k));
      }
    });
    for (int k = 0; k < 4; ++k) _mm512_storeu_si512(window.out + c + 64 * k, best[k]);
  }
  for (; c < window.channels; c += 64) {
    const __mmask64 m = byte_lanes(window.channels - c);
    __m512i best = lowest;
    for_each_tap(window, window.base + c, [&](const uint8_t* tap) __attribute__((always_inline)) {
      best = max_codes<kSigned>(best, _mm512_maskz_loadu_epi8(m, tap));
    });
    _mm512_mask_storeu_epi8(window.out + c, m, best);
  }
}

// Four windows side by side of up to 64 channels: the loops over the taps run once for all.
template <bool kSigned>
QK_INLINE void max_four_windows(const PoolWindows& windows) {
  const __mmask64 m = byte_lanes(windows.channels);
  const __m512i lowest = kSigned ? _mm512_set1_epi8(-128) : _mm512_setzero_si512();
  __m512i best[4] = {lowest, lowest, lowest, lowest};
  for_each_tap(windows, windows.base, [&](const uint8_t* tap) __attribute__((always_inline)) {
    for (int k = 0; k < 4; ++k) {
      best[k] = max_codes<kSigned>(best[k], _mm512_maskz_loadu_epi8(m, tap + k * windows.step));
    }
  });
  for (int k = 0; k < 4; ++k) {
    _mm512_mask_storeu_epi8(windows.out + k * windows.out_step, m, best[k]);
  }
}

template <bool kSigned>
QK_INLINE void max_windows(PoolWindows windows) {
  if (windows.channels <= 64) {
    for (; windows.count >= 4; windows.count -= 4) {
      max_four_windows<kSigned>(windows);
      windows.base += 4 * windows.step;
      windows.out += 4 * windows.out_step;
    }
  }
  for_each_window(windows, [](const PoolWindows& window)
                               __attribute__((always_inline)) { max_window<kSigned>(window); });
}

// Moves 64 sums from 16 to 32 bits; all inside lanes of 16 bytes.
QK_INLINE void flush(__m512i& low, __m512i& high, __m512i wide[4]) {
  const __m512i zero = _mm512_setzero_si512();
  wide[0] = _mm512_add_epi32(wide[0], _mm512_unpacklo_epi16(low, zero));
  wide[1] = _mm512_add_epi32(wide[1], _mm512_unpackhi_epi16(low, zero));
  wide[2] = _mm512_add_epi32(wide[2], _mm512_unpacklo_epi16(high, zero));
  wide[3] = _mm512_add_epi32(wide[3], _mm512_unpackhi_epi16(high, zero));
  low = high = zero;
}

// Adds the codes of `taps` taps to 16-bit sums of kVectors * 64 channels.
template <int kVectors>
QK_INLINE void add_taps(const uint8_t* tap, int64_t taps, int64_t stride, __m512i flip,
                        __mmask64 last, __m512i low[kVectors], __m512i high[kVectors]) {
  const __m512i zero = _mm512_setzero_si512();
  __m512i l[kVectors], h[kVectors];
  for (int k = 0; k < kVectors; ++k) l[k] = low[k], h[k] = high[k];
  for (; taps > 0; --taps, tap += stride) {
    for (int k = 0; k < kVectors; ++k) {
      const __m512i bytes = k + 1 < kVectors ? _mm512_loadu_si512(tap + 64 * k)
                                             : _mm512_maskz_loadu_epi8(last, tap + 64 * k);
      const __m512i q = _mm512_xor_si512(bytes, flip);
      l[k] = _mm512_add_epi16(l[k], _mm512_unpacklo_epi8(q, zero));
      h[k] = _mm512_add_epi16(h[k], _mm512_unpackhi_epi8(q, zero));
    }
  }
  for (int k = 0; k < kVectors; ++k) low[k] = l[k], high[k] = h[k];
}

// The means of kVectors * 64 channels, the last vector under a mask, in one pass over the window.
// An int8 code plus 128 is its byte with the top bit flipped: sums are unsigned either way.
template <bool kOutSigned, int kVectors>
QK_INLINE void mean_channels(const PoolWindows& window, int64_t c, const MeanGrid& grid) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(grid.q_signed ? 0x80 : 0));
  const int32_t zero_byte = grid.q_zero_point + (grid.q_signed ? 128 : 0);
  const int64_t taps = window.taps[0] * window.taps[1] * window.taps[2];
  const __m512i start = _mm512_set1_epi32(-static_cast<int32_t>(taps) * zero_byte);
  const __mmask64 last = byte_lanes(window.channels - c - 64 * (kVectors - 1));
  __m512i low[kVectors], high[kVectors], wide[kVectors][4];
  for (int k = 0; k < kVectors; ++k) {
    low[k] = high[k] = _mm512_setzero_si512();
    for (int j = 0; j < 4; ++j) wide[k][j] = start;
  }
  int64_t room = kFlush;
  for (int64_t row = 0; row < window.taps[0] * window.taps[1]; ++row) {
    const uint8_t* tap = window.base + c + row / window.taps[1] * window.stride[0] +
                         row % window.taps[1] * window.stride[1];
    for (int64_t left = window.taps[2]; left > 0;) {
      const int64_t n = left < room ? left : room;
      add_taps<kVectors>(tap, n, window.stride[2], flip, last, low, high);
      tap += n * window.stride[2];
      left -= n;
      room -= n;
      if (room == 0) {
        for (int k = 0; k < kVectors; ++k) flush(low[k], high[k], wide[k]);
        room = kFlush;
      }
    }
  }
  const __m512 multiplier = _mm512_set1_ps(grid.scale_ratio / static_cast<float>(grid.divisor));
  const __m512i zp = _mm512_set1_epi32(grid.out_zero_point), zp16 = pack16(zp, zp);
  const CodeRange range = code_range(grid.qmin, grid.qmax);
  for (int k = 0; k < kVectors; ++k) {
    flush(low[k], high[k], wide[k]);
    __m512i v[4];
    for (int j = 0; j < 4; ++j) {
      v[j] = round_to_int(_mm512_mul_ps(_mm512_cvtepi32_ps(wide[k][j]), multiplier));
    }
    const __m512i q = pack_codes<kOutSigned>(_mm512_adds_epi16(pack16(v[0], v[1]), zp16),
                                             _mm512_adds_epi16(pack16(v[2], v[3]), zp16), range);
    const __mmask64 m = k + 1 < kVectors ? ~__mmask64{0} : last;
    _mm512_mask_storeu_epi8(window.out + c + 64 * k, m, q);
  }
}

template <bool kOutSigned>
QK_INLINE void mean_window(const PoolWindows& window, const MeanGrid& grid) {
  int64_t c = 0;
  for (; window.channels - c > 128; c += 256) {
    if (window.channels - c > 192) {
      mean_channels<kOutSigned, 4>(window, c, grid);
    } else {
      mean_channels<kOutSigned, 3>(window, c, grid);
    }
  }
  if (window.channels - c > 64) {
    mean_channels<kOutSigned, 2>(window, c, grid);
  } else if (window.channels > c) {
    mean_channels<kOutSigned, 1>(window, c, grid);
  }
}

}  // namespace

void max_pool_avx512vnni(const PoolWindows& windows, bool is_signed) {
  is_signed ? max_windows<true>(windows) : max_windows<false>(windows);
}

void avg_pool_avx512vnni(const PoolWindows& windows, const MeanGrid& grid) {
  for_each_window(windows, [&](const PoolWindows& window) __attribute__((always_inline)) {
    grid.out_signed ? mean_window<true>(window, grid) : mean_window<false>(window, grid);
  });
}

}  // namespace qk
QK_TARGET_END
