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

// Exactly n <= 8 bytes between memory and a register.
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

// The first n <= 8 lanes (or all), without the masked stores that some cores take apart.
QK_INLINE void store_lanes_x8(void* out, __m256i v, int64_t n) {
  if (n >= 8) {
    _mm256_storeu_si256(static_cast<__m256i*>(out), v);
    return;
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
  __builtin_memcpy(out, lanes, static_cast<size_t>(4 * n));
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
    store_lanes_x8(out, _mm256_castps_si256(v), n);
    return;
  }
  alignas(16) uint16_t lanes[8];
  const __m128i half = type == OutputType::kBF16
                           ? bfloat16_x8(v)
                           : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), half);
  __builtin_memcpy(out, lanes, static_cast<size_t>(2 * (n < 8 ? n : 8)));
}

QK_INLINE __m256 scale_x8(__m256i acc, __m256 addend, __m256 mult) {
  return _mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(acc), addend), mult);
}

// Stores the first n <= 8 lanes at `out`, in any output type; table and residual are left to the
// caller.
QK_INLINE void store_x8(const Epilogue& e, __m256i acc, __m256 addend, __m256 mult, void* out,
                        int64_t n) {
  if (e.output == OutputType::kS32) {
    store_lanes_x8(out, acc, n);
    return;
  }
  const __m256 v = scale_x8(acc, addend, mult);
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

// From rounded values to the bytes that are stored: valid when (acc + addend) * mult stays in the
// int32 range (PackedHeader::wide == 0). int8 is clamped as uint8, 128 higher.
struct PackX32 {
  PackX32(const Epilogue& e, int32_t zero, int32_t qmin, int32_t qmax, bool has_clamp)
      : shifts(zero != 0 || e.is_signed()), clamps(has_clamp) {
    const int shift = e.is_signed() ? 128 : 0;
    zero_point = _mm256_set1_epi16(static_cast<int16_t>(zero + shift));
    low = _mm256_set1_epi8(static_cast<char>(qmin + shift));
    high = _mm256_set1_epi8(static_cast<char>(qmax + shift));
    flip = _mm256_set1_epi8(static_cast<char>(shift));
  }
  explicit PackX32(const Epilogue& e) : PackX32(e, e.zero_point, e.qmin, e.qmax, e.clamps()) {}
  PackX32(const Epilogue& e, const ResidualAdd& add)
      : PackX32(e, add.zero_point, add.qmin, add.qmax, e.residual_clamps()) {}

  // Four vectors, one behind the other.
  inline __attribute__((always_inline)) __m256i run(__m256i q0, __m256i q1, __m256i q2,
                                                    __m256i q3) const {
    return _mm256_permutevar8x32_epi32(by_lanes(q0, q1, q2, q3),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  // The low lanes of four vectors, then their high lanes.
  inline __attribute__((always_inline)) __m256i by_lanes(__m256i q0, __m256i q1, __m256i q2,
                                                         __m256i q3) const {
    __m256i words0 = _mm256_packs_epi32(q0, q1), words1 = _mm256_packs_epi32(q2, q3);
    if (shifts) {
      words0 = _mm256_adds_epi16(words0, zero_point);
      words1 = _mm256_adds_epi16(words1, zero_point);
    }
    __m256i bytes = _mm256_packus_epi16(words0, words1);
    if (clamps) {
      bytes = _mm256_min_epu8(_mm256_max_epu8(bytes, low), high);
      bytes = _mm256_xor_si256(bytes, flip);
    }
    return bytes;
  }

  __m256i zero_point, low, high, flip;
  bool shifts, clamps;  // whether the bytes have a zero point, and a clamp
};

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

// residual_add() on values that are not yet bytes, as FusedAddX16 of x86_avx512_epilogue.h.
struct FusedAddX8 {
  explicit FusedAddX8(const Epilogue& e)
      : low(_mm256_set1_ps(static_cast<float>(e.qmin - e.zero_point))),
        high(_mm256_set1_ps(static_cast<float>(e.qmax - e.zero_point))),
        up(_mm256_set1_ps(0x1.8p23f)),
        down(_mm256_set1_ps(0x1.8p23f - static_cast<float>(e.zero_point))),
        scale(_mm256_set1_ps(e.residual.scale)),
        offset(_mm256_set1_ps(e.residual.offset)),
        residual_scale(_mm256_set1_ps(e.residual.residual_scale)),
        residual_offset(_mm256_set1_ps(e.residual.residual_offset)),
        inv(_mm256_set1_ps(e.residual.inv_scale)) {}

  // RNE of the sum over the output scale, from v = (acc + addend) * mult and n residual bytes.
  template <bool ResidualSigned>
  inline __attribute__((always_inline)) __m256i run(__m256 v, const uint8_t* r, int64_t n) const {
    return run(v, load_bytes_x8(r, n, ResidualSigned));
  }

  // The same of residuals that are floats already.
  inline __attribute__((always_inline)) __m256i run(__m256 v, __m256 r) const {
    v = _mm256_min_ps(_mm256_max_ps(v, low), high);
    const __m256 q = _mm256_sub_ps(_mm256_add_ps(v, up), down);
    const __m256 a = _mm256_fmadd_ps(q, scale, offset);
    const __m256 b = _mm256_fmadd_ps(r, residual_scale, residual_offset);
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_add_ps(a, b), inv));
  }

  __m256 low, high, up, down, scale, offset, residual_scale, residual_offset, inv;
};
