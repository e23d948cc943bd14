// 32 channels a vector; the last ones go through a buffer, so that nothing is read or written
// outside. Sums as in x86_avx512vnni.cc.
#include "csrc/base/x86_avx2.h"

#include "csrc/base/numerics.h"
#include "csrc/pool/pool.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

// Codes that a 16-bit sum can take: 257 * 255 = 65535.
constexpr int kFlush = 257;

#include "csrc/pool/windows.h"

// n < 32 bytes; the rest are zero.
QK_INLINE __m256i load_part(const uint8_t* p, int64_t n) {
  alignas(32) uint8_t bytes[32] = {};
  __builtin_memcpy(bytes, p, static_cast<size_t>(n));
  return load256(bytes);
}

QK_INLINE void store_part(uint8_t* p, int64_t n, __m256i v) {
  alignas(32) uint8_t bytes[32];
  store256(bytes, v);
  __builtin_memcpy(p, bytes, static_cast<size_t>(n));
}

template <bool kSigned>
QK_INLINE __m256i max_codes(__m256i a, __m256i b) {
  return kSigned ? _mm256_max_epi8(a, b) : _mm256_max_epu8(a, b);
}

template <bool kSigned>
QK_INLINE void max_window(const PoolWindows& window) {
  const __m256i lowest = kSigned ? _mm256_set1_epi8(-128) : _mm256_setzero_si256();
  int64_t c = 0;
  for (; c + 64 <= window.channels; c += 64) {
    __m256i first = lowest, second = lowest;
    for_each_tap(window, window.base + c, [&](const uint8_t* tap) __attribute__((always_inline)) {
      first = max_codes<kSigned>(first, load256(tap));
      second = max_codes<kSigned>(second, load256(tap + 32));
    });
    store256(window.out + c, first);
    store256(window.out + c + 32, second);
  }
  for (; c < window.channels; c += 32) {
    const int64_t n = window.channels - c;
    __m256i best = lowest;
    for_each_tap(window, window.base + c, [&](const uint8_t* tap) __attribute__((always_inline)) {
      best = max_codes<kSigned>(best, n >= 32 ? load256(tap) : load_part(tap, n));
    });
    if (n >= 32) {
      store256(window.out + c, best);
    } else {
      store_part(window.out + c, n, best);
    }
  }
}

// An int8 code plus 128 is its byte with the top bit flipped: sums are unsigned either way.
template <bool kOutSigned>
QK_INLINE void mean_window(const PoolWindows& window, const MeanGrid& grid) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(grid.q_signed ? 0x80 : 0));
  const int32_t zero_byte = grid.q_zero_point + (grid.q_signed ? 128 : 0);
  const int64_t taps = window.taps[0] * window.taps[1] * window.taps[2];
  const __m256i start = _mm256_set1_epi32(-static_cast<int32_t>(taps) * zero_byte);
  const __m256 multiplier = _mm256_set1_ps(grid.scale_ratio / static_cast<float>(grid.divisor));
  const __m256i zp = _mm256_set1_epi32(grid.out_zero_point), zp16 = pack16(zp, zp);
  const CodeRange range = code_range(grid.qmin, grid.qmax);
  for (int64_t c = 0; c < window.channels; c += 32) {
    const int64_t n = window.channels - c;
    __m256i sum[4] = {start, start, start, start}, low = zero, high = zero;
    int room = kFlush;
    const auto flush = [&]() __attribute__((always_inline)) {
      sum[0] = _mm256_add_epi32(sum[0], _mm256_unpacklo_epi16(low, zero));
      sum[1] = _mm256_add_epi32(sum[1], _mm256_unpackhi_epi16(low, zero));
      sum[2] = _mm256_add_epi32(sum[2], _mm256_unpacklo_epi16(high, zero));
      sum[3] = _mm256_add_epi32(sum[3], _mm256_unpackhi_epi16(high, zero));
      low = high = zero;
      room = kFlush;
    };
    for_each_tap(window, window.base + c, [&](const uint8_t* tap) __attribute__((always_inline)) {
      const __m256i q = _mm256_xor_si256(n >= 32 ? load256(tap) : load_part(tap, n), flip);
      low = _mm256_add_epi16(low, _mm256_unpacklo_epi8(q, zero));
      high = _mm256_add_epi16(high, _mm256_unpackhi_epi8(q, zero));
      if (--room == 0) flush();
    });
    flush();
    for (int k = 0; k < 4; ++k) {
      sum[k] = round_to_int(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[k]), multiplier));
    }
    const __m256i q =
        pack_codes<kOutSigned>(_mm256_adds_epi16(pack16(sum[0], sum[1]), zp16),
                               _mm256_adds_epi16(pack16(sum[2], sum[3]), zp16), range);
    if (n >= 32) {
      store256(window.out + c, q);
    } else {
      store_part(window.out + c, n, q);
    }
  }
}

}  // namespace

void max_pool_avx2(const PoolWindows& windows, bool is_signed) {
  if (is_signed) {
    for_each_window(windows, [](const PoolWindows& window)
                                 __attribute__((always_inline)) { max_window<true>(window); });
  } else {
    for_each_window(windows, [](const PoolWindows& window)
                                 __attribute__((always_inline)) { max_window<false>(window); });
  }
}

void avg_pool_avx2(const PoolWindows& windows, const MeanGrid& grid) {
  for_each_window(windows, [&](const PoolWindows& window) __attribute__((always_inline)) {
    grid.out_signed ? mean_window<true>(window, grid) : mean_window<false>(window, grid);
  });
}

}  // namespace qk
QK_TARGET_END
