// What the two 256-bit depthwise kernels share. Include it after x86_depthwise_tile.h, inside the
// target region and the anonymous namespace of a kernel file.

template <int V>
struct Row256;

template <>
struct Row256<4> {
  using Type = __m256i;
  QK_INLINE Type fill(uint8_t byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
  template <bool Flip>
  QK_INLINE Type load(const uint8_t* p, int64_t n, Type flip) {
    alignas(32) uint8_t bytes[32];
    if (n < 32) {
      copy_bytes(bytes, p, n);
      p = bytes;
    }
    const Type v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return Flip ? _mm256_xor_si256(v, flip) : v;
  }
  QK_INLINE void interleave(const Type (&r)[4], uint8_t* dst) {
    const Type ab0 = _mm256_unpacklo_epi8(r[0], r[1]), ab1 = _mm256_unpackhi_epi8(r[0], r[1]);
    const Type cd0 = _mm256_unpacklo_epi8(r[2], r[3]), cd1 = _mm256_unpackhi_epi8(r[2], r[3]);
    auto* q = reinterpret_cast<__m256i*>(dst);
    _mm256_store_si256(q, _mm256_unpacklo_epi16(ab0, cd0));
    _mm256_store_si256(q + 1, _mm256_unpackhi_epi16(ab0, cd0));
    _mm256_store_si256(q + 2, _mm256_unpacklo_epi16(ab1, cd1));
    _mm256_store_si256(q + 3, _mm256_unpackhi_epi16(ab1, cd1));
  }
};

template <>
struct Row256<2> {
  using Type = __m128i;
  QK_INLINE Type fill(uint8_t byte) { return _mm_set1_epi8(static_cast<char>(byte)); }
  template <bool Flip>
  QK_INLINE Type load(const uint8_t* p, int64_t n, Type flip) {
    alignas(16) uint8_t bytes[16];
    if (n < 16) {
      copy_bytes(bytes, p, n);
      p = bytes;
    }
    const Type v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
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

struct Ymm {
  static constexpr int kLanes = 8, kColumns = 2, kPairColumns = 2;
  static constexpr bool kUnrolls = false;
  using Vector = __m256i;
  template <int V>
  using Row = Row256<V>;

  QK_INLINE __m256i load(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  QK_INLINE __m256 load_floats(const float* p) { return _mm256_loadu_ps(p); }
  QK_INLINE void store(int32_t* p, __m256i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  QK_INLINE __m256i narrow(__m256i acc, __m256 addend, __m256 mult) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(acc), addend), mult));
  }
  QK_INLINE __m256i permute(__m256i pixel, __m256i order) {
    return _mm256_permutevar8x32_epi32(pixel, order);
  }
  QK_INLINE __m256i pack(__m256i a, __m256i b) { return _mm256_packs_epi32(a, b); }

  template <int V, bool Bare>
  QK_INLINE void store_bytes(const __m256i (&pairs)[V / 2], const DepthwiseStrip& s, uint8_t* out) {
    __m256i low = pairs[0], high = V == 4 ? pairs[V / 4] : low, q;
    if (Bare) {
      q = _mm256_packus_epi16(low, high);
    } else {
      const __m256i zero_point = _mm256_set1_epi16(s.zero_point);
      low = _mm256_adds_epi16(low, zero_point);
      high = V == 4 ? _mm256_adds_epi16(high, zero_point) : low;
      q = _mm256_packus_epi16(low, high);
      q = _mm256_max_epu8(q, _mm256_set1_epi8(static_cast<char>(s.qmin)));
      q = _mm256_min_epu8(q, _mm256_set1_epi8(static_cast<char>(s.qmax)));
      q = _mm256_xor_si256(q, _mm256_set1_epi8(static_cast<char>(s.output_flip)));
    }
    if constexpr (V == 2) {
      q = _mm256_permutevar8x32_epi32(q, _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0));
    }
    if (s.channels == 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), q);
    } else if (V == 2 && s.channels == 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(q));
    } else {
      alignas(32) uint8_t bytes[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), q);
      copy_bytes(out, bytes, s.channels);
    }
  }
};
