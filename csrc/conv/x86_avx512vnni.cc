// The depthwise strip with 512-bit dot products: blocks of 64, 32 or 16 channels as 4, 2 or 1
// vectors. Memory, numbers and the trick: depthwise.h; with three or five taps a row another,
// x86_avx512_depthwise_rolling.h. Rows are read and outputs written under a mask, so nothing
// outside the block is touched.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/base/x86_avx512.h"
#include "csrc/conv/depthwise.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

#include "csrc/conv/x86_depthwise_tile.h"

template <int V>
struct Row512;

template <>
struct Row512<4> {
  using Type = __m512i;
  QK_INLINE Type fill(uint8_t byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
  template <bool Flip>
  QK_INLINE Type load(const uint8_t* p, int64_t n, Type flip) {
    return load_masked<Flip, false>(p, avx512::byte_lanes(n), flip);
  }
  // The bytes of `mask`; all of them if Whole.
  template <bool Flip, bool Whole>
  QK_INLINE Type load_masked(const uint8_t* p, __mmask64 mask, Type flip) {
    const Type v = Whole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask, p);
    return Flip ? _mm512_xor_si512(v, flip) : v;
  }
  template <bool Whole>
  QK_INLINE void store_masked(uint8_t* p, __mmask64 mask, __m512i v) {
    Whole ? _mm512_storeu_si512(p, v) : _mm512_mask_storeu_epi8(p, mask, v);
  }
  QK_INLINE void interleave(const Type (&r)[4], __m512i (&q)[4]) {
    const Type ab0 = _mm512_unpacklo_epi8(r[0], r[1]), ab1 = _mm512_unpackhi_epi8(r[0], r[1]);
    const Type cd0 = _mm512_unpacklo_epi8(r[2], r[3]), cd1 = _mm512_unpackhi_epi8(r[2], r[3]);
    q[0] = _mm512_unpacklo_epi16(ab0, cd0);
    q[1] = _mm512_unpackhi_epi16(ab0, cd0);
    q[2] = _mm512_unpacklo_epi16(ab1, cd1);
    q[3] = _mm512_unpackhi_epi16(ab1, cd1);
  }
  template <int Pass>
  QK_INLINE void interleave_part(const Type (&r)[4], __m512i (&q)[4]) {
    interleave(r, q);
  }
  // Vectors 2 * Pass and 2 * Pass + 1.
  template <int Pass>
  QK_INLINE void interleave_part(const Type (&r)[4], __m512i (&q)[2]) {
    const Type ab = Pass == 0 ? _mm512_unpacklo_epi8(r[0], r[1]) : _mm512_unpackhi_epi8(r[0], r[1]);
    const Type cd = Pass == 0 ? _mm512_unpacklo_epi8(r[2], r[3]) : _mm512_unpackhi_epi8(r[2], r[3]);
    q[0] = _mm512_unpacklo_epi16(ab, cd);
    q[1] = _mm512_unpackhi_epi16(ab, cd);
  }
  QK_INLINE void interleave(const Type (&r)[4], uint8_t* dst) {
    __m512i q[4];
    interleave(r, q);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_store_si512(dst + 64 * i, q[i]);
  }
};

template <>
struct Row512<2> {
  using Type = __m256i;
  QK_INLINE Type fill(uint8_t byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
  template <bool Flip>
  QK_INLINE Type load(const uint8_t* p, int64_t n, Type flip) {
    return load_masked<Flip, false>(p, avx512::byte_lanes(n), flip);
  }
  template <bool Flip, bool Whole>
  QK_INLINE Type load_masked(const uint8_t* p, __mmask64 mask, Type flip) {
    const Type v = Whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                         : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), p);
    return Flip ? _mm256_xor_si256(v, flip) : v;
  }
  template <bool Whole>
  QK_INLINE void store_masked(uint8_t* p, __mmask64 mask, __m512i v) {
    const __m256i bytes = _mm512_castsi512_si256(v);
    Whole ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes)
          : _mm256_mask_storeu_epi8(p, static_cast<__mmask32>(mask), bytes);
  }
  QK_INLINE void interleave(const Type (&r)[4], __m512i (&q)[2]) {
    const Type ab0 = _mm256_unpacklo_epi8(r[0], r[1]), ab1 = _mm256_unpackhi_epi8(r[0], r[1]);
    const Type cd0 = _mm256_unpacklo_epi8(r[2], r[3]), cd1 = _mm256_unpackhi_epi8(r[2], r[3]);
    q[0] = join(_mm256_unpacklo_epi16(ab0, cd0), _mm256_unpackhi_epi16(ab0, cd0));
    q[1] = join(_mm256_unpacklo_epi16(ab1, cd1), _mm256_unpackhi_epi16(ab1, cd1));
  }
  template <int Pass>
  QK_INLINE void interleave_part(const Type (&r)[4], __m512i (&q)[2]) {
    interleave(r, q);
  }
  QK_INLINE __m512i join(Type low, Type high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  QK_INLINE void interleave(const Type (&r)[4], uint8_t* dst) {
    __m512i q[2];
    interleave(r, q);
    _mm512_store_si512(dst, q[0]);
    _mm512_store_si512(dst + 64, q[1]);
  }
};

template <>
struct Row512<1> {
  using Type = __m128i;
  QK_INLINE Type fill(uint8_t byte) { return _mm_set1_epi8(static_cast<char>(byte)); }
  template <bool Flip>
  QK_INLINE Type load(const uint8_t* p, int64_t n, Type flip) {
    const Type v = _mm_maskz_loadu_epi8(static_cast<__mmask16>(avx512::byte_lanes(n)), p);
    return Flip ? _mm_xor_si128(v, flip) : v;
  }
  QK_INLINE void interleave(const Type (&r)[4], uint8_t* dst) {
    const Type ab0 = _mm_unpacklo_epi8(r[0], r[1]), ab1 = _mm_unpackhi_epi8(r[0], r[1]);
    const Type cd0 = _mm_unpacklo_epi8(r[2], r[3]), cd1 = _mm_unpackhi_epi8(r[2], r[3]);
    auto* q = reinterpret_cast<__m128i*>(dst);
    _mm_store_si128(q, _mm_unpacklo_epi16(ab0, cd0));
    _mm_store_si128(q + 1, _mm_unpackhi_epi16(ab0, cd0));
    _mm_store_si128(q + 2, _mm_unpacklo_epi16(ab1, cd1));
    _mm_store_si128(q + 3, _mm_unpackhi_epi16(ab1, cd1));
  }
};

struct Avx512 {
  static constexpr int kLanes = 16, kColumns = 4, kPairColumns = 4, kVectorBytes = 64,
                       kDwordRows = 4;
  static constexpr bool kForGroups = true, kForChannels = true, kHoldsTaps = true;
  static constexpr bool kUnrolls = false;
  using Vector = __m512i;
  using Weights = __m512i;
  template <int V>
  using Row = Row512<V>;

  QK_INLINE __m512i load(const int32_t* p) { return _mm512_loadu_si512(p); }
  QK_INLINE __m512 load_floats(const float* p) { return _mm512_loadu_ps(p); }
  QK_INLINE void store(int32_t* p, __m512i v) { _mm512_storeu_si512(p, v); }
  QK_INLINE void store_dwords(uint8_t* p, __m512i v) { _mm512_store_si512(p, v); }
  QK_INLINE __m512i load_activations(const uint8_t* p) { return _mm512_load_si512(p); }
  QK_INLINE __m512i load_weights(const int8_t* p) { return _mm512_load_si512(p); }
  // One instruction as asm: gcc 12 spills the accumulators around the intrinsic.
  QK_INLINE void dot(__m512i& acc, __m512i a, __m512i w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(w));
  }
  QK_INLINE __m512i narrow(__m512i acc, __m512 addend, __m512 mult) {
    return _mm512_cvt_roundps_epi32(
        _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(acc), addend), mult),
        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  QK_INLINE __m512i permute(__m512i pixel, __m512i order) {
    return _mm512_permutexvar_epi32(order, pixel);
  }
  QK_INLINE __m512i pack(__m512i a, __m512i b) { return _mm512_packs_epi32(a, b); }

  // The int16 of V vectors as 16 * V bytes, channels in order. Without a zero point and with the
  // whole range of uint8, as behind a ReLU, there is nothing to do but to pack.
  template <int V>
  QK_INLINE __m512i pack_bytes(const __m512i (&pairs)[(V + 1) / 2], const DepthwiseStrip& s,
                               bool bare) {
    __m512i low = pairs[0], high = V == 4 ? pairs[V / 4] : low, q;
    if (bare) {
      q = _mm512_packus_epi16(low, high);
    } else {
      const __m512i zero_point = _mm512_set1_epi16(s.zero_point);
      low = _mm512_adds_epi16(low, zero_point);
      high = V == 4 ? _mm512_adds_epi16(high, zero_point) : low;
      q = _mm512_packus_epi16(low, high);
      q = _mm512_max_epu8(q, _mm512_set1_epi8(static_cast<char>(s.qmin)));
      q = _mm512_min_epu8(q, _mm512_set1_epi8(static_cast<char>(s.qmax)));
      q = _mm512_xor_si512(q, _mm512_set1_epi8(static_cast<char>(s.output_flip)));
    }
    if (V == 2) {
      const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 4, 12, 5, 13, 0, 0, 0, 0, 0, 0, 0, 0);
      q = _mm512_permutexvar_epi32(order, q);
    } else if (V == 1) {
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
      q = _mm512_permutexvar_epi32(order, q);
    }
    return q;
  }
  template <int V, bool Bare>
  QK_INLINE void store_bytes(const __m512i (&pairs)[(V + 1) / 2], const DepthwiseStrip& s,
                             uint8_t* out) {
    const __m512i q = pack_bytes<V>(pairs, s, Bare);
    const __mmask64 mask = avx512::byte_lanes(s.channels);
    if constexpr (V == 4) {
      _mm512_mask_storeu_epi8(out, mask, q);
    } else if constexpr (V == 2) {
      _mm256_mask_storeu_epi8(out, static_cast<__mmask32>(mask), _mm512_castsi512_si256(q));
    } else {
      _mm_mask_storeu_epi8(out, static_cast<__mmask16>(mask), _mm512_castsi512_si128(q));
    }
  }
};

#include "csrc/conv/x86_avx512_depthwise_rolling.h"

}  // namespace

void depthwise_avx512vnni(const DepthwiseStrip& s) {
  if (s.vectors == 4) {
    depthwise_block<4>(s);
  } else if (s.vectors == 2) {
    depthwise_block<2>(s);
  } else {
    block<Avx512, 1>(s);
  }
}

}  // namespace qk
QK_TARGET_END
