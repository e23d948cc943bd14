// 32 codes a step, then 8, then one by one.
#include "csrc/base/x86_avx2.h"

#include "csrc/base/numerics.h"
#include "csrc/quantize/quantize.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

template <typename T, bool kPerElement, bool kSigned>
QK_INLINE void quantize_run(const QuantizeRun& run) {
  const T* x = static_cast<const T*>(run.x);
  uint8_t* q = static_cast<uint8_t*>(run.q);
  const CodeRange range = code_range(run.qmin, run.qmax);
  const __m256 uniform_inv = _mm256_set1_ps(run.grid.inv_scale[0]);
  const __m256i uniform_zp = _mm256_set1_epi32(run.grid.zero_point[0]);
  const __m256i uniform_zp16 = pack16(uniform_zp, uniform_zp);
  const auto rounded = [&](int64_t i) __attribute__((always_inline)) {
    const __m256 inv = kPerElement ? _mm256_loadu_ps(run.grid.inv_scale + i) : uniform_inv;
    return round_to_int(_mm256_mul_ps(load(x + i), inv));
  };
  int64_t i = 0;
  for (; i + 32 <= run.n; i += 32) {
    const __m256i v[4] = {rounded(i), rounded(i + 8), rounded(i + 16), rounded(i + 24)};
    __m256i zp01 = uniform_zp16, zp23 = uniform_zp16;
    if (kPerElement) {
      const int32_t* zp = run.grid.zero_point + i;
      zp01 = pack16(load256(zp), load256(zp + 8));
      zp23 = pack16(load256(zp + 16), load256(zp + 24));
    }
    store256(q + i, codes32<kSigned>(v, zp01, zp23, range));
  }
  for (; i + 8 <= run.n; i += 8) {
    const __m256i zp = kPerElement ? load256(run.grid.zero_point + i) : uniform_zp;
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), codes8<kSigned>(rounded(i), zp, range));
  }
  for (; i < run.n; ++i) {
    const int64_t c = kPerElement ? i : 0;
    q[i] = static_cast<uint8_t>(quantize(to_float(x[i]), run.grid.inv_scale[c],
                                         run.grid.zero_point[c], run.qmin, run.qmax));
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

QK_INLINE __m256i load_codes(const uint8_t* q) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
}
QK_INLINE __m256i load_codes(const int8_t* q) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
}
QK_INLINE __m256i load_codes(const int32_t* q) { return load256(q); }

template <typename T, bool kPerElement, typename Q>
QK_INLINE void dequantize_run(const DequantizeRun& run) {
  const Q* q = static_cast<const Q*>(run.q);
  T* x = static_cast<T*>(run.x);
  const __m256 uniform_scale = _mm256_set1_ps(run.grid.scale[0]);
  const __m256i uniform_zp = _mm256_set1_epi32(run.grid.zero_point[0]);
  const auto value = [&](int64_t i) __attribute__((always_inline)) {
    const __m256 scale = kPerElement ? _mm256_loadu_ps(run.grid.scale + i) : uniform_scale;
    const __m256i zp = kPerElement ? load256(run.grid.zero_point + i) : uniform_zp;
    const __m256i offset = _mm256_sub_epi32(load_codes(q + i), zp);
    return _mm256_mul_ps(_mm256_cvtepi32_ps(offset), scale);
  };
  const auto scalar = [&](int64_t i) __attribute__((always_inline)) {
    const int64_t c = kPerElement ? i : 0;
    from_float(dequantize(q[i], run.grid.scale[c], run.grid.zero_point[c]), x + i);
  };
  int64_t i = 0;
  if (run.stream) {
    // Elements before the first 8-element boundary.
    const uintptr_t address = reinterpret_cast<uintptr_t>(x);
    const int64_t head = static_cast<int64_t>(-address / sizeof(T) % 8);
    if (address % sizeof(T) == 0 && head < run.n) {
      for (; i < head; ++i) scalar(i);
      for (; i + 8 <= run.n; i += 8) stream(x + i, value(i));
    }
  }
  for (; i + 8 <= run.n; i += 8) store(x + i, value(i));
  // The mask tells gcc that the tail is short, or it vectorizes it.
  for (int64_t k = 0, tail = (run.n - i) & 7; k < tail; ++k) scalar(i + k);
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

void quantize_f32_avx2(const QuantizeRun& run) { quantize_any<float>(run); }
void quantize_bf16_avx2(const QuantizeRun& run) { quantize_any<BFloat16>(run); }
void quantize_f16_avx2(const QuantizeRun& run) { quantize_any<Float16>(run); }
void dequantize_f32_avx2(const DequantizeRun& run) { dequantize_any<float>(run); }
void dequantize_bf16_avx2(const DequantizeRun& run) { dequantize_any<BFloat16>(run); }
void dequantize_f16_avx2(const DequantizeRun& run) { dequantize_any<Float16>(run); }

}  // namespace qk
QK_TARGET_END
