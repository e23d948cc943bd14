// 64 codes a step; the tail under masks.
#include "csrc/base/x86_avx512.h"
#include "csrc/quantize/quantize.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

template <typename T, bool kPerElement, bool kSigned>
QK_INLINE void quantize_run(const QuantizeRun& run) {
  const T* x = static_cast<const T*>(run.x);
  uint8_t* q = static_cast<uint8_t*>(run.q);
  const CodeRange range = code_range(run.qmin, run.qmax);
  const __m512 uniform_inv = _mm512_set1_ps(run.grid.inv_scale[0]);
  const __m512i uniform_zp = _mm512_set1_epi32(run.grid.zero_point[0]);
  const __m512i uniform_zp16 = pack16(uniform_zp, uniform_zp);
  int64_t i = 0;
  for (; i + 64 <= run.n; i += 64) {
    __m512i v[4];
    for (int k = 0; k < 4; ++k) {
      const int64_t j = i + 16 * k;
      const __m512 inv = kPerElement ? _mm512_loadu_ps(run.grid.inv_scale + j) : uniform_inv;
      v[k] = round_to_int(_mm512_mul_ps(load(x + j, 0xffff), inv));
    }
    __m512i zp01 = uniform_zp16, zp23 = uniform_zp16;
    if (kPerElement) {
      const int32_t* zp = run.grid.zero_point + i;
      zp01 = pack16(_mm512_loadu_si512(zp), _mm512_loadu_si512(zp + 16));
      zp23 = pack16(_mm512_loadu_si512(zp + 32), _mm512_loadu_si512(zp + 48));
    }
    _mm512_storeu_si512(q + i, codes64<kSigned>(v, zp01, zp23, range));
  }
  for (; i < run.n; i += 16) {
    const __mmask16 m = lanes(run.n - i);
    const __m512 inv = kPerElement ? _mm512_maskz_loadu_ps(m, run.grid.inv_scale + i) : uniform_inv;
    const __m512i zp =
        kPerElement ? _mm512_maskz_loadu_epi32(m, run.grid.zero_point + i) : uniform_zp;
    const __m512i v = round_to_int(_mm512_mul_ps(load(x + i, m), inv));
    _mm_mask_storeu_epi8(q + i, m, codes16<kSigned>(v, zp, range));
  }
}

template <typename T>
QK_INLINE void quantize_any(const QuantizeRun& run) {
  if (run.grid.per_element) {
    run.q_signed ? quantize_run<T, true, true>(run) : quantize_run<T, true, false>(run);
  } else {
    run.q_signed ? quantize_run<T, false, true>(run) : quantize_run<T, false, false>(run);
  }
}

QK_INLINE __m512i load_codes(const uint8_t* q, __mmask16 m) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, q));
}
QK_INLINE __m512i load_codes(const int8_t* q, __mmask16 m) {
  return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, q));
}
QK_INLINE __m512i load_codes(const int32_t* q, __mmask16 m) {
  return _mm512_maskz_loadu_epi32(m, q);
}

template <typename T, bool kPerElement, typename Q>
QK_INLINE void dequantize_run(const DequantizeRun& run) {
  const Q* q = static_cast<const Q*>(run.q);
  T* x = static_cast<T*>(run.x);
  const __m512 uniform_scale = _mm512_set1_ps(run.grid.scale[0]);
  const __m512i uniform_zp = _mm512_set1_epi32(run.grid.zero_point[0]);
  const auto value = [&](int64_t i, __mmask16 m) __attribute__((always_inline)) {
    const __m512 scale = kPerElement ? _mm512_maskz_loadu_ps(m, run.grid.scale + i) : uniform_scale;
    const __m512i zp =
        kPerElement ? _mm512_maskz_loadu_epi32(m, run.grid.zero_point + i) : uniform_zp;
    const __m512i offset = _mm512_sub_epi32(load_codes(q + i, m), zp);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(offset), scale);
  };
  int64_t i = 0;
  if (run.stream) {
    // Elements before the first boundary of 64 bytes.
    const uintptr_t address = reinterpret_cast<uintptr_t>(x);
    const int64_t head = static_cast<int64_t>(-address % 64 / sizeof(T));
    if (address % sizeof(T) == 0 && head < run.n) {
      for (; i < head; i += 16) store(x + i, lanes(head - i), value(i, lanes(head - i)));
      for (i = head; i + 32 <= run.n; i += 32) {
        store2<true>(x + i, value(i, 0xffff), value(i + 16, 0xffff));
      }
    }
  }
  for (; i + 64 <= run.n; i += 64) {
    __m512 v[4];
    for (int k = 0; k < 4; ++k) v[k] = value(i + 16 * k, 0xffff);
    store2<false>(x + i, v[0], v[1]);
    store2<false>(x + i + 32, v[2], v[3]);
  }
  for (; i < run.n; i += 16) store(x + i, lanes(run.n - i), value(i, lanes(run.n - i)));
}

template <typename T, bool kPerElement>
QK_INLINE void dequantize_codes(const DequantizeRun& run) {
  switch (run.q_type) {
    case CodeType::kUInt8:
      return dequantize_run<T, kPerElement, uint8_t>(run);
    case CodeType::kInt8:
      return dequantize_run<T, kPerElement, int8_t>(run);
    case CodeType::kInt32:
      return dequantize_run<T, kPerElement, int32_t>(run);
  }
}

template <typename T>
QK_INLINE void dequantize_any(const DequantizeRun& run) {
  run.grid.per_element ? dequantize_codes<T, true>(run) : dequantize_codes<T, false>(run);
}

}  // namespace

void quantize_f32_avx512vnni(const QuantizeRun& run) { quantize_any<float>(run); }
void quantize_bf16_avx512vnni(const QuantizeRun& run) { quantize_any<BFloat16>(run); }
void quantize_f16_avx512vnni(const QuantizeRun& run) { quantize_any<Float16>(run); }
void dequantize_f32_avx512vnni(const DequantizeRun& run) { dequantize_any<float>(run); }
void dequantize_bf16_avx512vnni(const DequantizeRun& run) { dequantize_any<BFloat16>(run); }
void dequantize_f16_avx512vnni(const DequantizeRun& run) { dequantize_any<Float16>(run); }

}  // namespace qk
QK_TARGET_END
