// 8 elements a vector; head and tail one by one.
#include "csrc/base/x86_avx2.h"

#include "csrc/base/numerics.h"
#include "csrc/fake_quant/fake_quant.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

struct GridVector {
  __m256 scale, inv_scale, lo, hi;
};

QK_INLINE GridVector grid_vector(__m256 scale, __m256 inv_scale, __m256i zp, int32_t qmin,
                                 int32_t qmax) {
  return {scale, inv_scale, _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32(qmin), zp)),
          _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32(qmax), zp))};
}

template <typename T, bool kPerElement>
QK_INLINE void fake_quant_run(const FakeQuantRun& run) {
  const T* x = static_cast<const T*>(run.x);
  T* y = static_cast<T*>(run.y);
  const GridSpan& span = run.grid;
  const GridVector uniform =
      grid_vector(_mm256_set1_ps(span.scale[0]), _mm256_set1_ps(span.inv_scale[0]),
                  _mm256_set1_epi32(span.zero_point[0]), run.qmin, run.qmax);
  const __m256 rounder = _mm256_set1_ps(kRounder);
  const auto value = [&](int64_t i) __attribute__((always_inline)) {
    const GridVector grid =
        kPerElement
            ? grid_vector(_mm256_loadu_ps(span.scale + i), _mm256_loadu_ps(span.inv_scale + i),
                          load256(span.zero_point + i), run.qmin, run.qmax)
            : uniform;
    const __m256 v = _mm256_mul_ps(load(x + i), grid.inv_scale);
    const __m256 bounded = _mm256_min_ps(_mm256_max_ps(v, grid.lo), grid.hi);  // NaN: lo
    const __m256 offset = _mm256_sub_ps(_mm256_add_ps(bounded, rounder), rounder);
    return _mm256_mul_ps(offset, grid.scale);
  };
  const auto scalar = [&](int64_t i) __attribute__((always_inline)) {
    const int64_t c = kPerElement ? i : 0;
    from_float(fake_quant(to_float(x[i]), span.scale[c], span.inv_scale[c], span.zero_point[c],
                          run.qmin, run.qmax),
               y + i);
  };
  int64_t i = 0;
  if (run.stream) {
    // Elements before the first 8-element boundary.
    const uintptr_t address = reinterpret_cast<uintptr_t>(y);
    const int64_t head = static_cast<int64_t>(-address / sizeof(T) % 8);
    if (address % sizeof(T) == 0 && head < run.n) {
      for (; i < head; ++i) scalar(i);
      for (; i + 8 <= run.n; i += 8) stream(y + i, value(i));
    }
  }
  for (; i + 32 <= run.n; i += 32) {
    __m256 v[4];
    for (int k = 0; k < 4; ++k) v[k] = value(i + 8 * k);
    for (int k = 0; k < 4; ++k) store(y + i + 8 * k, v[k]);
  }
  for (; i + 8 <= run.n; i += 8) store(y + i, value(i));
  // The mask tells gcc that the tail is short, or it vectorizes it.
  for (int64_t k = 0, tail = (run.n - i) & 7; k < tail; ++k) scalar(i + k);
}

template <typename T>
QK_INLINE void fake_quant_any(const FakeQuantRun& run) {
  run.grid.per_element ? fake_quant_run<T, true>(run) : fake_quant_run<T, false>(run);
}

}  // namespace

void fake_quant_f32_avx2(const FakeQuantRun& run) { fake_quant_any<float>(run); }
void fake_quant_bf16_avx2(const FakeQuantRun& run) { fake_quant_any<BFloat16>(run); }
void fake_quant_f16_avx2(const FakeQuantRun& run) { fake_quant_any<Float16>(run); }

}  // namespace qk
QK_TARGET_END
