// The dot products of AVX-VNNI. Include it inside the target region (QK_ISA_AVXVNNI) and the
// anonymous namespace of a kernel file.
//
// Where QK_EMULATE_AVXVNNI is defined, AVX2 computes the same sums, so that tests run the kernels
// on a CPU without AVX-VNNI.

#if defined(QK_EMULATE_AVXVNNI)

// acc += four products of bytes a lane, a unsigned, b signed.
QK_INLINE void dot_bytes(__m256i& acc, __m256i a, __m256i b) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  acc = _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}

// acc += two products of int16 a lane.
QK_INLINE void dot_words(__m256i& acc, __m256i a, __m256i b) {
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}

#else

// One instruction as asm: gcc 12 spills the accumulators around the intrinsics.

// acc += four products of bytes a lane, a unsigned, b signed.
QK_INLINE void dot_bytes(__m256i& acc, __m256i a, __m256i b) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
}

// acc += two products of int16 a lane.
QK_INLINE void dot_words(__m256i& acc, __m256i a, __m256i b) {
  __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
}

#endif
