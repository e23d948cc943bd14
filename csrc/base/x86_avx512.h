// Pieces that AVX512 kernels share: 16 floats from and to memory of any float type, and 64 codes
// from 64 values in units of the output scale.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns about its own _mm512_undefined_*() wherever an intrinsic is inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "csrc/base/dtype.h"
#include "csrc/base/target.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk::avx512 {

inline constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// The first n (at most 16) lanes.
QK_INLINE __mmask16 lanes(int64_t n) {
  return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1);
}
QK_INLINE __mmask64 byte_lanes(int64_t n) { return n >= 64 ? ~__mmask64{0} : (1ull << n) - 1; }

QK_INLINE __m512 load(const float* x, __mmask16 m) { return _mm512_maskz_loadu_ps(m, x); }
QK_INLINE __m512 load(const BFloat16* x, __mmask16 m) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
QK_INLINE __m512 load(const Float16* x, __mmask16 m) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, x));
}

QK_INLINE void store(float* x, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(x, m, v); }
// Rounded to bfloat16, in the high halves; the low halves are left over. v is not NaN.
QK_INLINE __m512i round_bfloat16(__m512 v) {
  const __m512i u = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __m512i half =
      _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fff), odd, _mm512_set1_epi32(0x8000));
  return _mm512_add_epi32(u, half);
}
QK_INLINE __m256i to_bfloat16(__m512 v) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bfloat16(v), 16));
}
QK_INLINE void store(BFloat16* x, __mmask16 m, __m512 v) {
  _mm256_mask_storeu_epi16(x, m, to_bfloat16(v));
}
QK_INLINE void store(Float16* x, __mmask16 m, __m512 v) {
  _mm256_mask_storeu_epi16(x, m, _mm512_cvtps_ph(v, kNearestEven));
}

// kStream: past the caches; x is then aligned to 64 bytes.
template <bool kStream>
QK_INLINE void store64_bytes(void* x, __m512i v) {
  kStream ? _mm512_stream_si512(static_cast<__m512i*>(x), v) : _mm512_storeu_si512(x, v);
}
// 32 values.
template <bool kStream>
QK_INLINE void store2(float* x, __m512 a, __m512 b) {
  store64_bytes<kStream>(x, _mm512_castps_si512(a));
  store64_bytes<kStream>(x + 16, _mm512_castps_si512(b));
}
template <bool kStream>
QK_INLINE void store2(BFloat16* x, __m512 a, __m512 b) {
  const __m512i pairs = _mm512_packus_epi32(_mm512_srli_epi32(round_bfloat16(a), 16),
                                            _mm512_srli_epi32(round_bfloat16(b), 16));
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  store64_bytes<kStream>(x, _mm512_permutexvar_epi64(order, pairs));
}
template <bool kStream>
QK_INLINE void store2(Float16* x, __m512 a, __m512 b) {
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(a, kNearestEven));
  store64_bytes<kStream>(x, _mm512_inserti64x4(low, _mm512_cvtps_ph(b, kNearestEven), 1));
}

// 32 bfloat16 as the 16 of even and the 16 of odd index, and back: cheaper than in order.
struct BFloat16Pairs {
  __m512 even, odd;
};
QK_INLINE BFloat16Pairs load_pairs(const BFloat16* x) {
  const __m512i v = _mm512_loadu_si512(x);
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(v, high))};
}
template <bool kStream>
QK_INLINE void store_pairs(BFloat16* x, const BFloat16Pairs& v) {
  const __m512i even = _mm512_srli_epi32(round_bfloat16(v.even), 16);
  store64_bytes<kStream>(x, _mm512_mask_blend_epi16(0xaaaaaaaau, even, round_bfloat16(v.odd)));
}

// RNE(v) as int32. Values above 2^30 saturate; NaN and values below -2^31 become INT_MIN.
QK_INLINE __m512i round_to_int(__m512 v) {
  const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(0x1p30f), v);  // NaN: the second operand
  return _mm512_cvt_roundps_epi32(bounded, kNearestEven);
}

// Four vectors to 16-bit with saturation; lane l of the results holds parts of lane l of each.
QK_INLINE __m512i pack16(__m512i a, __m512i b) { return _mm512_packs_epi32(a, b); }

// The ends of a grid, for 64 codes.
struct CodeRange {
  __m512i lo, hi;
};
QK_INLINE CodeRange code_range(int32_t qmin, int32_t qmax) {
  return {_mm512_set1_epi8(static_cast<char>(qmin)), _mm512_set1_epi8(static_cast<char>(qmax))};
}

template <bool kSigned>
QK_INLINE __m512i pack_codes(__m512i low, __m512i high, const CodeRange& range) {
  if constexpr (kSigned) {
    const __m512i q = _mm512_packs_epi16(low, high);
    return _mm512_min_epi8(_mm512_max_epi8(q, range.lo), range.hi);
  } else {
    const __m512i q = _mm512_packus_epi16(low, high);
    return _mm512_min_epu8(_mm512_max_epu8(q, range.lo), range.hi);
  }
}

// 64 codes, in order, of 4 x 16 rounded values; zp01 and zp23 are pack16 of the zero points.
template <bool kSigned>
QK_INLINE __m512i codes64(const __m512i v[4], __m512i zp01, __m512i zp23, const CodeRange& range) {
  const __m512i low = _mm512_adds_epi16(pack16(v[0], v[1]), zp01);
  const __m512i high = _mm512_adds_epi16(pack16(v[2], v[3]), zp23);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, pack_codes<kSigned>(low, high, range));
}

// 16 codes of one vector of rounded values.
template <bool kSigned>
QK_INLINE __m128i codes16(__m512i v, __m512i zp, const CodeRange& range) {
  const __m512i packed = pack16(v, v);
  const __m512i offset = _mm512_adds_epi16(packed, pack16(zp, zp));
  const __m512i q = pack_codes<kSigned>(offset, offset, range);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  return _mm512_castsi512_si128(_mm512_permutexvar_epi32(order, q));
}

template <bool kSigned>
QK_INLINE __m512i four_codes(const __m512i v[4], __m512i zp01, __m512i zp23,
                             const CodeRange& range) {
  return codes64<kSigned>(v, zp01, zp23, range);
}
template <bool kSigned>
QK_INLINE __m128i one_codes(__m512i v, __m512i zp, const CodeRange& range) {
  return codes16<kSigned>(v, zp, range);
}

// The counterpart of avx2::Vec.
struct Vec {
  using F = __m512;
  using M = __mmask16;
  static constexpr int kLanes = 16;

  QK_INLINE F set(float v) { return _mm512_set1_ps(v); }
  QK_INLINE F zero() { return _mm512_setzero_ps(); }
  template <typename T>
  QK_INLINE F get(const T* x) {
    return load(x, 0xffff);
  }
  template <typename T>
  QK_INLINE F get(const T* x, int64_t n) {
    return load(x, lanes(n));
  }
  template <typename T>
  QK_INLINE void put(T* x, F v) {
    store(x, 0xffff, v);
  }
  // Integers in the range of a byte, signed or not.
  QK_INLINE void put_bytes(uint8_t* x, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  template <typename T>
  QK_INLINE void put(T* x, F v, int64_t n) {
    store(x, lanes(n), v);
  }
  QK_INLINE void stream(float* x, F v) { _mm512_stream_ps(x, v); }
  QK_INLINE void stream(BFloat16* x, F v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(x), to_bfloat16(v));
  }
  QK_INLINE void stream(Float16* x, F v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(v, kNearestEven));
  }
  template <bool kStream, typename T>
  QK_INLINE void put_two(T* x, F a, F b) {
    store2<kStream>(x, a, b);
  }
  // Keeps gcc from making one masked load of a load and a mask: it would wait for what decides the
  // mask, and a miss of the one tensor would follow a miss of the other.
  template <typename T>
  QK_INLINE T loaded(T v) {
    __asm__("" : "+v"(v));
    return v;
  }
  template <bool kStream>
  QK_INLINE void copy_where(uint32_t* out, const uint32_t* in, M m) {
    store64_bytes<kStream>(out, _mm512_maskz_mov_epi32(m, loaded(_mm512_loadu_si512(in))));
  }
  template <bool kStream>
  QK_INLINE void copy_where(uint16_t* out, const uint16_t* in, M m) {
    const __m256i v =
        _mm256_maskz_mov_epi16(m, loaded(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in))));
    __m256i* target = reinterpret_cast<__m256i*>(out);
    kStream ? _mm256_stream_si256(target, v) : _mm256_storeu_si256(target, v);
  }
  QK_INLINE void copy_where(uint32_t* out, const uint32_t* in, M m, int64_t n) {
    _mm512_mask_storeu_epi32(out, lanes(n), _mm512_maskz_loadu_epi32(m & lanes(n), in));
  }
  QK_INLINE void copy_where(uint16_t* out, const uint16_t* in, M m, int64_t n) {
    _mm256_mask_storeu_epi16(out, lanes(n), _mm256_maskz_loadu_epi16(m & lanes(n), in));
  }
  using I = __m512i;
  QK_INLINE I set_int(int32_t v) { return _mm512_set1_epi32(v); }
  QK_INLINE I get_int(const int32_t* x) { return _mm512_loadu_si512(x); }
  QK_INLINE I get_int(const int32_t* x, int64_t n) { return _mm512_maskz_loadu_epi32(lanes(n), x); }
  QK_INLINE void put_int(void* x, I v) { _mm512_storeu_si512(x, v); }
  QK_INLINE I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  QK_INLINE I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
  QK_INLINE I mul_int(I a, I b) { return _mm512_mullo_epi32(a, b); }
  QK_INLINE I xor_int(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int kBits>
  QK_INLINE I shift_right(I a) {
    return _mm512_srli_epi32(a, kBits);
  }
  QK_INLINE I counting() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  QK_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  QK_INLINE I get_codes(const uint8_t* q, int64_t n = kLanes) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes(n), q));
  }
  QK_INLINE I get_codes(const int8_t* q, int64_t n = kLanes) {
    return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), q));
  }
  QK_INLINE I get_codes(const int32_t* q, int64_t n = kLanes) { return get_int(q, n); }
  QK_INLINE void put_codes(uint8_t* q, __m128i codes, int64_t n) {
    _mm_mask_storeu_epi8(q, lanes(n), codes);
  }
  QK_INLINE F get(const int32_t* x) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(x)); }
  QK_INLINE F get(const int32_t* x, int64_t n) {
    return _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(lanes(n), x));
  }

  QK_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  QK_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  QK_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  QK_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  QK_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  QK_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  QK_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  QK_INLINE F round(F a) { return _mm512_roundscale_ps(a, kNearestEven); }
  QK_INLINE F abs(F a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
  QK_INLINE F with_sign_of(F magnitude, F sign) {
    const F bit = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(bit, magnitude), _mm512_and_ps(bit, sign));
  }
  QK_INLINE F exp2_integer(F n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
  }

  QK_INLINE float least(F a) { return _mm512_reduce_min_ps(a); }
  QK_INLINE float greatest(F a) { return _mm512_reduce_max_ps(a); }

  QK_INLINE M none() { return 0; }
  QK_INLINE M first_lanes(int64_t n) { return lanes(n); }
  QK_INLINE M ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  QK_INLINE M gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  QK_INLINE M le(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  QK_INLINE M unordered(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  QK_INLINE M both(M a, M b) { return _kand_mask16(a, b); }
  QK_INLINE M either(M a, M b) { return _kor_mask16(a, b); }
  QK_INLINE F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  QK_INLINE F keep(M m, F a) { return _mm512_maskz_mov_ps(m, loaded(a)); }
  QK_INLINE F drop(M m, F a) { return _mm512_maskz_mov_ps(_knot_mask16(m), loaded(a)); }
  QK_INLINE uint32_t bits(M m) { return _cvtmask16_u32(m); }
  QK_INLINE M from_bits(uint32_t b) { return _cvtu32_mask16(b); }
};

}  // namespace qk::avx512
QK_TARGET_END
