// The epilogue of epilogue.h on 16-lane vectors. Include it inside a target region
// (QK_ISA_AVX512VNNI or wider), inside namespace qk, after <immintrin.h>, epilogue.h and target.h.
//
// Numbers: the bits of store_output(). Trick: a clamp of the rounded value is exact in float32
// (integers below 2^24), so the conversion to int32 never sees a value that it cannot hold.

QK_INLINE __mmask16 mask16(int64_t n) {
  return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1u);
}
QK_INLINE __mmask64 mask64(int64_t n) { return n >= 64 ? ~__mmask64{0} : (1ull << n) - 1ull; }

// clamp(RNE(v)) in [low, high], both already relative to the zero point; NaN -> low.
QK_INLINE __m512i quantize_offset_x16(__m512 v, __m512 low, __m512 high) {
  v = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(v, low), high));
}

QK_INLINE __m512i requantize_x16(const Epilogue& e, __m512i acc, __m512 addend, __m512 mult) {
  const __m512 v = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(acc), addend), mult);
  const __m512 low = _mm512_set1_ps(static_cast<float>(e.qmin - e.zero_point));
  const __m512 high = _mm512_set1_ps(static_cast<float>(e.qmax - e.zero_point));
  return _mm512_add_epi32(quantize_offset_x16(v, low, high), _mm512_set1_epi32(e.zero_point));
}

QK_INLINE __m256i bfloat16_x16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}

// Stores the lanes of `mask` as float32, bfloat16 or float16.
QK_INLINE void store_floats_x16(OutputType type, __m512 v, void* out, __mmask16 mask) {
  if (type == OutputType::kF32) {
    _mm512_mask_storeu_ps(out, mask, v);
  } else if (type == OutputType::kBF16) {
    _mm256_mask_storeu_epi16(out, mask, bfloat16_x16(v));
  } else {
    _mm256_mask_storeu_epi16(out, mask,
                             _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

// Stores the lanes of `mask` at `out`, in any output type; table and residual are left to
// finish_bytes_avx512().
QK_INLINE void store_x16(const Epilogue& e, __m512i acc, __m512 addend, __m512 mult, void* out,
                         __mmask16 mask) {
  if (e.output == OutputType::kS32) {
    _mm512_mask_storeu_epi32(out, mask, acc);
  } else if (!e.is_8bit()) {
    const __m512 v = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(acc), addend), mult);
    store_floats_x16(e.output, v, out, mask);
  } else {
    const __m512i q = requantize_x16(e, acc, addend, mult);
    _mm_mask_storeu_epi8(out, mask, _mm512_cvtepi32_epi8(q));
  }
}

// Constants of the packed 8-bit store: valid when (acc + addend) * mult stays in the int32 range
// (PackedHeader::wide == 0). int8 is clamped as uint8, 128 higher.
struct Requantize64 {
  __m512i zero_point, low, high, flip, order;
};

QK_INLINE Requantize64 requantize64_constants(int32_t zero_point, int32_t qmin, int32_t qmax,
                                              bool is_signed) {
  const int shift = is_signed ? 128 : 0;
  return {_mm512_set1_epi16(static_cast<int16_t>(zero_point + shift)),
          _mm512_set1_epi8(static_cast<char>(qmin + shift)),
          _mm512_set1_epi8(static_cast<char>(qmax + shift)),
          _mm512_set1_epi8(static_cast<char>(shift)),
          _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)};
}
QK_INLINE Requantize64 requantize64_constants(const Epilogue& e) {
  return requantize64_constants(e.zero_point, e.qmin, e.qmax, e.is_signed());
}
QK_INLINE Requantize64 residual64_constants(const Epilogue& e) {
  const ResidualAdd& r = e.residual;
  return requantize64_constants(r.zero_point, r.qmin, r.qmax, e.is_signed());
}

// Four vectors of RNE((acc + addend) * mult), columns in order, to 64 bytes.
QK_INLINE __m512i pack_x64(const Requantize64& c, __m512i q0, __m512i q1, __m512i q2, __m512i q3) {
  const __m512i x = _mm512_adds_epi16(_mm512_packs_epi32(q0, q1), c.zero_point);
  const __m512i y = _mm512_adds_epi16(_mm512_packs_epi32(q2, q3), c.zero_point);
  const __m512i bytes = _mm512_permutexvar_epi32(c.order, _mm512_packus_epi16(x, y));
  return _mm512_xor_si512(_mm512_min_epu8(_mm512_max_epu8(bytes, c.low), c.high), c.flip);
}

QK_INLINE __m512i scale_x16(__m512i acc, __m512 addend, __m512 mult) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(acc), addend), mult));
}

QK_INLINE __m512 bytes_to_float(__m128i bytes, bool is_signed) {
  return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
}

// The constants of residual_add(), loaded once: a store of bytes may alias the Epilogue.
struct ResidualAddX16 {
  explicit ResidualAddX16(const Epilogue& e, bool residual_is_signed)
      : scale(_mm512_set1_ps(e.residual.scale)),
        offset(_mm512_set1_ps(e.residual.offset)),
        residual_scale(_mm512_set1_ps(e.residual.residual_scale)),
        residual_offset(_mm512_set1_ps(e.residual.residual_offset)),
        inv(_mm512_set1_ps(e.residual.inv_scale)),
        low(_mm512_set1_ps(static_cast<float>(e.residual.qmin - e.residual.zero_point))),
        high(_mm512_set1_ps(static_cast<float>(e.residual.qmax - e.residual.zero_point))),
        zero_point(_mm512_set1_epi32(e.residual.zero_point)),
        output_signed(e.is_signed()),
        residual_signed(residual_is_signed) {}

  inline __attribute__((always_inline)) __m128i add(__m128i q, __m128i r) const {
    const __m512 a = _mm512_fmadd_ps(bytes_to_float(q, output_signed), scale, offset);
    const __m512 b =
        _mm512_fmadd_ps(bytes_to_float(r, residual_signed), residual_scale, residual_offset);
    const __m512i sum = quantize_offset_x16(_mm512_mul_ps(_mm512_add_ps(a, b), inv), low, high);
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(sum, zero_point));
  }

  // q[i] = residual_add(q[i], r[i]) in place.
  inline __attribute__((always_inline)) void run(uint8_t* q, const uint8_t* r, int64_t n) const {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      auto* to = reinterpret_cast<__m128i*>(q + i);
      _mm_storeu_si128(
          to, add(_mm_loadu_si128(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(r + i))));
    }
    if (i < n) {
      const __mmask16 mask = mask16(n - i);
      _mm_mask_storeu_epi8(
          q + i, mask, add(_mm_maskz_loadu_epi8(mask, q + i), _mm_maskz_loadu_epi8(mask, r + i)));
    }
  }

  __m512 scale, offset, residual_scale, residual_offset, inv, low, high;
  __m512i zero_point;
  bool output_signed, residual_signed;
};

// residual_add() on values that are not yet bytes: valid under PackedHeader::wide == 0, like the
// packed store. A clamp at integers and the rounding may change places; adding 1.5 * 2^23 rounds a
// small float to an integer in the current mode (to nearest even) and subtracting that number less
// the zero point leaves the code.
struct FusedAddX16 {
  FusedAddX16() = default;
  explicit FusedAddX16(const Epilogue& e)
      : low(_mm512_set1_ps(static_cast<float>(e.qmin - e.zero_point))),
        high(_mm512_set1_ps(static_cast<float>(e.qmax - e.zero_point))),
        up(_mm512_set1_ps(0x1.8p23f)),
        down(_mm512_set1_ps(0x1.8p23f - static_cast<float>(e.zero_point))),
        scale(_mm512_set1_ps(e.residual.scale)),
        offset(_mm512_set1_ps(e.residual.offset)),
        residual_scale(_mm512_set1_ps(e.residual.residual_scale)),
        residual_offset(_mm512_set1_ps(e.residual.residual_offset)),
        inv(_mm512_set1_ps(e.residual.inv_scale)) {}

  // RNE of the sum over the output scale, from v = (acc + addend) * mult and 16 residual bytes.
  template <bool ResidualSigned>
  inline __attribute__((always_inline)) __m512i run(__m512 v, __m128i r) const {
    v = _mm512_min_ps(_mm512_max_ps(v, low), high);
    const __m512 q = _mm512_sub_ps(_mm512_add_ps(v, up), down);
    const __m512 a = _mm512_fmadd_ps(q, scale, offset);
    const __m512 b =
        _mm512_fmadd_ps(bytes_to_float(r, ResidualSigned), residual_scale, residual_offset);
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_add_ps(a, b), inv));
  }

  __m512 low, high, up, down, scale, offset, residual_scale, residual_offset, inv;
};
