// Pieces that AVX2 kernels share: 8 floats from and to memory of any float type, and codes from
// values in units of the output scale.
#pragma once

#include <immintrin.h>

#include "csrc/base/dtype.h"
#include "csrc/base/target.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk::avx2 {

inline constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

QK_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
QK_INLINE __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
QK_INLINE void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

QK_INLINE __m256 load(const float* x) { return _mm256_loadu_ps(x); }
QK_INLINE __m256 load(const BFloat16* x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(x)), 16));
}
QK_INLINE __m256 load(const Float16* x) { return _mm256_cvtph_ps(load128(x)); }

QK_INLINE void store(float* x, __m256 v) { _mm256_storeu_ps(x, v); }
// v is not NaN.
QK_INLINE __m128i to_bfloat16(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
QK_INLINE __m128i to_float16(__m256 v) { return _mm256_cvtps_ph(v, kNearestEven); }
QK_INLINE void store(BFloat16* x, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), to_bfloat16(v));
}
QK_INLINE void store(Float16* x, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), to_float16(v));
}

// Past the caches; x is aligned to 8 elements.
QK_INLINE void stream(float* x, __m256 v) { _mm256_stream_ps(x, v); }
QK_INLINE void stream(BFloat16* x, __m256 v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(x), to_bfloat16(v));
}
QK_INLINE void stream(Float16* x, __m256 v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(x), to_float16(v));
}

// RNE(v) as int32. Values above 2^30 saturate; NaN and values below -2^31 become INT_MIN.
QK_INLINE __m256i round_to_int(__m256 v) {
  const __m256 bounded = _mm256_min_ps(_mm256_set1_ps(0x1p30f), v);  // NaN: the second operand
  return _mm256_cvtps_epi32(_mm256_round_ps(bounded, kNearestEven));
}

QK_INLINE __m256i pack16(__m256i a, __m256i b) { return _mm256_packs_epi32(a, b); }

// The ends of a grid, for 32 codes.
struct CodeRange {
  __m256i lo, hi;
};
QK_INLINE CodeRange code_range(int32_t qmin, int32_t qmax) {
  return {_mm256_set1_epi8(static_cast<char>(qmin)), _mm256_set1_epi8(static_cast<char>(qmax))};
}

template <bool kSigned>
QK_INLINE __m256i pack_codes(__m256i low, __m256i high, const CodeRange& range) {
  if constexpr (kSigned) {
    const __m256i q = _mm256_packs_epi16(low, high);
    return _mm256_min_epi8(_mm256_max_epi8(q, range.lo), range.hi);
  } else {
    const __m256i q = _mm256_packus_epi16(low, high);
    return _mm256_min_epu8(_mm256_max_epu8(q, range.lo), range.hi);
  }
}

// 32 codes, in order, of 4 x 8 rounded values; zp01 and zp23 are pack16 of the zero points.
template <bool kSigned>
QK_INLINE __m256i codes32(const __m256i v[4], __m256i zp01, __m256i zp23, const CodeRange& range) {
  const __m256i low = _mm256_adds_epi16(pack16(v[0], v[1]), zp01);
  const __m256i high = _mm256_adds_epi16(pack16(v[2], v[3]), zp23);
  return _mm256_permutevar8x32_epi32(pack_codes<kSigned>(low, high, range),
                                     _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// 8 codes of one vector of rounded values, in the low half.
template <bool kSigned>
QK_INLINE __m128i codes8(__m256i v, __m256i zp, const CodeRange& range) {
  const __m256i offset = _mm256_adds_epi16(pack16(v, v), pack16(zp, zp));
  const __m256i q = pack_codes<kSigned>(offset, offset, range);
  return _mm256_castsi256_si128(
      _mm256_permutevar8x32_epi32(q, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4)));
}

// The two above by the names that avx512 has too; codes of one vector in the low bytes.
template <bool kSigned>
QK_INLINE __m256i four_codes(const __m256i v[4], __m256i zp01, __m256i zp23,
                             const CodeRange& range) {
  return codes32<kSigned>(v, zp01, zp23, range);
}
template <bool kSigned>
QK_INLINE __m128i one_codes(__m256i v, __m256i zp, const CodeRange& range) {
  return codes8<kSigned>(v, zp, range);
}

// What a kernel that is written once for every vector width is made of: kLanes floats and a mask.
// The `n` of a partial access is in [1, kLanes); lanes beyond it read as 0.
struct Vec {
  using F = __m256;
  using M = __m256;
  static constexpr int kLanes = 8;

  QK_INLINE F set(float v) { return _mm256_set1_ps(v); }
  QK_INLINE F zero() { return _mm256_setzero_ps(); }
  QK_INLINE __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  template <typename T>
  QK_INLINE F get(const T* x) {
    return load(x);
  }
  QK_INLINE F get(const float* x, int64_t n) { return _mm256_maskload_ps(x, first(n)); }
  template <typename Half>
  QK_INLINE F get(const Half* x, int64_t n) {
    Half part[kLanes] = {};
    for (int64_t i = 0; i < n && i < kLanes; ++i) part[i] = x[i];
    return load(part);
  }
  template <typename T>
  QK_INLINE void put(T* x, F v) {
    store(x, v);
  }
  // Integers in the range of a byte, signed or not.
  QK_INLINE void put_bytes(uint8_t* x, F v) {
    const __m256i low = _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_set1_epi32(255));
    const __m256i words = _mm256_packus_epi32(low, low), bytes = _mm256_packus_epi16(words, words);
    const __m256i both =
        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(x), _mm256_castsi256_si128(both));
  }
  QK_INLINE void put(float* x, F v, int64_t n) { _mm256_maskstore_ps(x, first(n), v); }
  template <typename Half>
  QK_INLINE void put(Half* x, F v, int64_t n) {
    Half part[kLanes];
    store(part, v);
    for (int64_t i = 0; i < n && i < kLanes; ++i) x[i] = part[i];
  }
  template <typename T>
  QK_INLINE void stream(T* x, F v) {
    avx2::stream(x, v);
  }
  // Two vectors side by side; streamed, x is aligned to one of them (avx512: to 64 bytes).
  template <bool kStream, typename T>
  QK_INLINE void put_two(T* x, F a, F b) {
    kStream ? avx2::stream(x, a) : store(x, a);
    kStream ? avx2::stream(x + kLanes, b) : store(x + kLanes, b);
  }
  // out = in where m is set, else 0, bit by bit.
  template <bool kStream>
  QK_INLINE void copy_where(uint32_t* out, const uint32_t* in, M m) {
    const __m256i v = _mm256_and_si256(_mm256_castps_si256(m), load256(in));
    kStream ? _mm256_stream_si256(reinterpret_cast<__m256i*>(out), v) : store256(out, v);
  }
  template <bool kStream>
  QK_INLINE void copy_where(uint16_t* out, const uint16_t* in, M m) {
    const __m256i wide = _mm256_castps_si256(m);
    const __m128i narrow =
        _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    const __m128i v = _mm_and_si128(narrow, load128(in));
    __m128i* target = reinterpret_cast<__m128i*>(out);
    kStream ? _mm_stream_si128(target, v) : _mm_storeu_si128(target, v);
  }
  // The first n lanes only.
  QK_INLINE void copy_where(uint32_t* out, const uint32_t* in, M m, int64_t n) {
    const __m256i lanes = first(n);
    const __m256i v = _mm256_maskload_epi32(reinterpret_cast<const int*>(in), lanes);
    _mm256_maskstore_epi32(reinterpret_cast<int*>(out), lanes,
                           _mm256_and_si256(_mm256_castps_si256(m), v));
  }
  QK_INLINE void copy_where(uint16_t* out, const uint16_t* in, M m, int64_t n) {
    const uint32_t set = bits(m);
    for (int64_t i = 0; i < n && i < kLanes; ++i) out[i] = set >> i & 1 ? in[i] : uint16_t{0};
  }
  // Integers.
  using I = __m256i;
  QK_INLINE I set_int(int32_t v) { return _mm256_set1_epi32(v); }
  QK_INLINE I get_int(const int32_t* x) { return load256(x); }
  QK_INLINE I get_int(const int32_t* x, int64_t n) { return _mm256_maskload_epi32(x, first(n)); }
  QK_INLINE void put_int(void* x, I v) { store256(x, v); }
  QK_INLINE I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  QK_INLINE I sub_int(I a, I b) { return _mm256_sub_epi32(a, b); }
  QK_INLINE I mul_int(I a, I b) { return _mm256_mullo_epi32(a, b); }
  QK_INLINE I xor_int(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int kBits>
  QK_INLINE I shift_right(I a) {
    return _mm256_srli_epi32(a, kBits);
  }
  QK_INLINE I counting() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  QK_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  QK_INLINE I get_codes(const uint8_t* q) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
  }
  QK_INLINE I get_codes(const int8_t* q) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
  }
  QK_INLINE I get_codes(const int32_t* q) { return load256(q); }
  QK_INLINE I get_codes(const int32_t* q, int64_t n) { return get_int(q, n); }
  template <typename Q>
  QK_INLINE I get_codes(const Q* q, int64_t n) {
    Q part[kLanes] = {};
    for (int64_t i = 0; i < n && i < kLanes; ++i) part[i] = q[i];
    return get_codes(part);
  }
  // The first n of one vector's codes.
  QK_INLINE void put_codes(uint8_t* q, __m128i codes, int64_t n) {
    if (n == kLanes) return _mm_storel_epi64(reinterpret_cast<__m128i*>(q), codes);
    uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(codes));
    for (int64_t i = 0; i < n && i < kLanes; ++i, bytes >>= 8) q[i] = static_cast<uint8_t>(bytes);
  }
  // Integers of the grid as floats.
  QK_INLINE F get(const int32_t* x) { return _mm256_cvtepi32_ps(load256(x)); }
  QK_INLINE F get(const int32_t* x, int64_t n) {
    return _mm256_cvtepi32_ps(_mm256_maskload_epi32(x, first(n)));
  }

  QK_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  QK_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  QK_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  QK_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  QK_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // NaN in either operand gives b.
  QK_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  QK_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  QK_INLINE F round(F a) { return _mm256_round_ps(a, kNearestEven); }
  QK_INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  QK_INLINE F with_sign_of(F magnitude, F sign) {
    const F bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
  }
  // 2^n for integers n in [-126, 127].
  QK_INLINE F exp2_integer(F n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }

  // The least and the greatest lane; no lane is NaN.
  QK_INLINE float least(F a) {
    __m128 v = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_min_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_min_ss(v, _mm_movehdup_ps(v)));
  }
  QK_INLINE float greatest(F a) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
  }

  QK_INLINE M none() { return _mm256_setzero_ps(); }
  QK_INLINE M first_lanes(int64_t n) { return _mm256_castsi256_ps(first(n)); }
  QK_INLINE M ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  QK_INLINE M gt(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  QK_INLINE M le(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
  QK_INLINE M unordered(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
  QK_INLINE M both(M a, M b) { return _mm256_and_ps(a, b); }
  QK_INLINE M either(M a, M b) { return _mm256_or_ps(a, b); }
  QK_INLINE F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  QK_INLINE F keep(M m, F a) { return _mm256_and_ps(m, a); }     // else +0
  QK_INLINE F drop(M m, F a) { return _mm256_andnot_ps(m, a); }  // +0 where m is set
  QK_INLINE uint32_t bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  QK_INLINE M from_bits(uint32_t b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(b)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, lane));
  }
};

}  // namespace qk::avx2
QK_TARGET_END
