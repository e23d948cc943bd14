// 16 elements a vector; head and tail under masks.
#include <type_traits>

#include "csrc/base/x86_avx512.h"
#include "csrc/fake_quant/fake_quant.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

struct GridVector {
  __m512 scale, inv_scale, lo, hi;
};

QK_INLINE GridVector grid_vector(__m512 scale, __m512 inv_scale, __m512i zp, int32_t qmin,
                                 int32_t qmax) {
  return {scale, inv_scale, _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(qmin), zp)),
          _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(qmax), zp))};
}

QK_INLINE __m512 apply(__m512 x, const GridVector& grid) {
  const __m512 rounder = _mm512_set1_ps(kRounder), v = _mm512_mul_ps(x, grid.inv_scale);
  const __m512 bounded = _mm512_min_ps(_mm512_max_ps(v, grid.lo), grid.hi);  // NaN: lo
  return _mm512_mul_ps(_mm512_sub_ps(_mm512_add_ps(bounded, rounder), rounder), grid.scale);
}

template <typename T, bool kPerElement>
QK_INLINE void fake_quant_run(const FakeQuantRun& run) {
  const T* x = static_cast<const T*>(run.x);
  T* y = static_cast<T*>(run.y);
  const GridSpan& span = run.grid;
  const GridVector uniform =
      grid_vector(_mm512_set1_ps(span.scale[0]), _mm512_set1_ps(span.inv_scale[0]),
                  _mm512_set1_epi32(span.zero_point[0]), run.qmin, run.qmax);
  const auto value = [&](int64_t i, __mmask16 m) __attribute__((always_inline)) {
    const GridVector grid =
        kPerElement
            ? grid_vector(_mm512_maskz_loadu_ps(m, span.scale + i),
                          _mm512_maskz_loadu_ps(m, span.inv_scale + i),
                          _mm512_maskz_loadu_epi32(m, span.zero_point + i), run.qmin, run.qmax)
            : uniform;
    return apply(load(x + i, m), grid);
  };
  const auto store_32 = [&](int64_t i, auto streams) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<T, BFloat16> && !kPerElement) {
      const BFloat16Pairs v = load_pairs(x + i);
      store_pairs<streams()>(y + i, {apply(v.even, uniform), apply(v.odd, uniform)});
    } else {
      store2<streams()>(y + i, value(i, 0xffff), value(i + 16, 0xffff));
    }
  };
  int64_t i = 0;
  if (run.stream) {
    // Elements before the first boundary of 64 bytes.
    const uintptr_t address = reinterpret_cast<uintptr_t>(y);
    const int64_t head = static_cast<int64_t>(-address % 64 / sizeof(T));
    if (address % sizeof(T) == 0 && head < run.n) {
      for (; i < head; i += 16) store(y + i, lanes(head - i), value(i, lanes(head - i)));
      for (i = head; i + 32 <= run.n; i += 32) store_32(i, std::true_type{});
    }
  }
  for (; i + 64 <= run.n; i += 64) {
    store_32(i, std::false_type{});
    store_32(i + 32, std::false_type{});
  }
  for (; i < run.n; i += 16) store(y + i, lanes(run.n - i), value(i, lanes(run.n - i)));
}

template <typename T>
QK_INLINE void fake_quant_any(const FakeQuantRun& run) {
  run.grid.per_element ? fake_quant_run<T, true>(run) : fake_quant_run<T, false>(run);
}

}  // namespace

void fake_quant_f32_avx512vnni(const FakeQuantRun& run) { fake_quant_any<float>(run); }
void fake_quant_bf16_avx512vnni(const FakeQuantRun& run) { fake_quant_any<BFloat16>(run); }
void fake_quant_f16_avx512vnni(const FakeQuantRun& run) { fake_quant_any<Float16>(run); }

}  // namespace qk
QK_TARGET_END
