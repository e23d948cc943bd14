// The epilogue of epilogue.h on 8-lane vectors. Include it inside a target region (QK_ISA_AVX2 or
// wider), inside namespace qk, after <immintrin.h>, epilogue.h and target.h.
//
// Numbers: the bits of store_output(). Trick: as in x86_avx512_epilogue.h.

// clamp(RNE(v)) in [low, high], both already relative to the zero point; NaN -> low.
QK_INLINE __m256i quantize_offset_x8(__m256 v, __m256 low, __m256 high) {
  v = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, low), high));
}

// The low bytes of 8 int32 lanes, in order.
QK_INLINE __m128i low_bytes_x8(__m256i v) {
  const __m256i pick =
      _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(v, pick);
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
}

// Exactly n <= 8 (or <= 16) bytes between memory and a register.
QK_INLINE __m128i load_bytes_upto8(const uint8_t* p, int64_t n) {
  uint64_t bytes = 0;
  if (n >= 8) {
    __builtin_memcpy(&bytes, p, 8);
  } else {
    for (int64_t i = 0; i < n; ++i) bytes |= static_cast<uint64_t>(p[i]) << (8 * i);
  }
  return _mm_cvtsi64_si128(static_cast<long long>(bytes));
}
QK_INLINE void store_bytes_upto8(uint8_t* p, __m128i v, int64_t n) {
  if (n >= 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v);
    return;
  }
  uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(v));
  for (int64_t i = 0; i < n; ++i, bytes >>= 8) p[i] = static_cast<uint8_t>(bytes);
}

QK_INLINE __m256i lane_mask_x8(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

QK_INLINE __m128i bfloat16_x8(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  return _mm256_castsi256_si128(packed);
}

// Stores the first n <= 8 lanes (or all) as float32, bfloat16 or float16.
QK_INLINE void store_floats_x8(OutputType type, __m256 v, void* out, int64_t n) {
  if (type == OutputType::kF32) {
    _mm256_maskstore_ps(static_cast<float*>(out), lane_mask_x8(n), v);
    return;
  }
  alignas(16) uint16_t lanes[8];
  const __m128i half = type == OutputType::kBF16
                           ? bfloat16_x8(v)
                           : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), half);
  __builtin_memcpy(out, lanes, static_cast<size_t>(2 * (n < 8 ? n : 8)));
}

// Stores the first n <= 8 lanes at `out`, in any output type; table and residual are left to the
// caller.
QK_INLINE void store_x8(const Epilogue& e, __m256i acc, __m256 addend, __m256 mult, void* out,
                        int64_t n) {
  if (e.output == OutputType::kS32) {
    _mm256_maskstore_epi32(static_cast<int*>(out), lane_mask_x8(n), acc);
    return;
  }
  const __m256 v = _mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(acc), addend), mult);
  if (!e.is_8bit()) {
    store_floats_x8(e.output, v, out, n);
  } else {
    const __m256 low = _mm256_set1_ps(static_cast<float>(e.qmin - e.zero_point));
    const __m256 high = _mm256_set1_ps(static_cast<float>(e.qmax - e.zero_point));
    const __m256i q =
        _mm256_add_epi32(quantize_offset_x8(v, low, high), _mm256_set1_epi32(e.zero_point));
    store_bytes_upto8(static_cast<uint8_t*>(out), low_bytes_x8(q), n);
  }
}

// Constants of the packed 8-bit store: valid when (acc + addend) * mult stays in the int32 range
// (PackedHeader::wide == 0). int8 is clamped as uint8, 128 higher.
struct Requantize16 {
  __m256i zero_point;
  __m128i low, high, flip;
};

QK_INLINE Requantize16 requantize16_constants(const Epilogue& e) {
  const int shift = e.is_signed() ? 128 : 0;
  return {_mm256_set1_epi16(static_cast<int16_t>(e.zero_point + shift)),
          _mm_set1_epi8(static_cast<char>(e.qmin + shift)),
          _mm_set1_epi8(static_cast<char>(e.qmax + shift)),
          _mm_set1_epi8(static_cast<char>(shift))};
}

QK_INLINE __m256i scale_x8(__m256i acc, __m256 addend, __m256 mult) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(acc), addend), mult));
}

// Two vectors of RNE((acc + addend) * mult), columns in order, to 16 bytes.
QK_INLINE __m128i pack_x16(const Requantize16& c, __m256i q0, __m256i q1) {
  const __m256i words =
      _mm256_adds_epi16(_mm256_permute4x64_epi64(_mm256_packs_epi32(q0, q1), 0xd8), c.zero_point);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  return _mm_xor_si128(_mm_min_epu8(_mm_max_epu8(bytes, c.low), c.high), c.flip);
}

QK_INLINE __m256 load_bytes_x8(const uint8_t* p, int64_t n, bool is_signed) {
  const __m128i bytes = load_bytes_upto8(p, n);
  return _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
}

// q[i] = residual_add(q[i], r[i]) in place.
QK_INLINE void residual_add_avx2(const Epilogue& e, uint8_t* q, const uint8_t* r,
                                 bool residual_signed, int64_t n) {
  const ResidualAdd& add = e.residual;
  const __m256 scale = _mm256_set1_ps(add.scale), offset = _mm256_set1_ps(add.offset);
  const __m256 r_scale = _mm256_set1_ps(add.residual_scale);
  const __m256 r_offset = _mm256_set1_ps(add.residual_offset);
  const __m256 inv = _mm256_set1_ps(add.inv_scale);
  const __m256 low = _mm256_set1_ps(static_cast<float>(add.qmin - add.zero_point));
  const __m256 high = _mm256_set1_ps(static_cast<float>(add.qmax - add.zero_point));
  const __m256i zero_point = _mm256_set1_epi32(add.zero_point);
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 a = _mm256_fmadd_ps(load_bytes_x8(q + i, n - i, e.is_signed()), scale, offset);
    const __m256 b =
        _mm256_fmadd_ps(load_bytes_x8(r + i, n - i, residual_signed), r_scale, r_offset);
    const __m256i sum = quantize_offset_x8(_mm256_mul_ps(_mm256_add_ps(a, b), inv), low, high);
    store_bytes_upto8(q + i, low_bytes_x8(_mm256_add_epi32(sum, zero_point)), n - i);
  }
}
