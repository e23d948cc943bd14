// 16 elements and 16 sums a vector; tails under masks (a masked lane adds +0).
#include <type_traits>

#include "csrc/base/x86_avx512.h"
#include "csrc/fake_quant_backward/backward.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

struct GridVector {
  __m512 inv_scale, lo, hi;
};

QK_INLINE GridVector grid_vector(__m512 inv_scale, __m512i zp, int32_t qmin, int32_t qmax) {
  return {inv_scale, _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(qmin), zp)),
          _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(qmax), zp))};
}

// out = passes ? grad : 0, bit by bit, in the lanes of m.
template <bool kStream>
QK_INLINE void store_passing(float* out, const float* grad, __mmask16 passes, __mmask16 m) {
  const __m512 v = _mm512_maskz_loadu_ps(passes & m, grad);
  kStream ? _mm512_stream_ps(out, v) : _mm512_mask_storeu_ps(out, m, v);
}
template <bool kStream, typename Half>
QK_INLINE void store_passing(Half* out, const Half* grad, __mmask16 passes, __mmask16 m) {
  const __m256i v = _mm256_maskz_loadu_epi16(passes & m, grad);
  kStream ? _mm256_stream_si256(reinterpret_cast<__m256i*>(out), v)
          : _mm256_mask_storeu_epi16(out, m, v);
}

template <typename T, bool kSums, bool kPerElement, bool kStream, bool kClips = false>
QK_INLINE void backward_run(const FakeQuantBackwardRun& run) {
  const T* grad = static_cast<const T*>(run.grad);
  const T* x = static_cast<const T*>(run.x);
  T* out = static_cast<T*>(run.out);
  const int64_t n = run.n;
  const GridSpan span = run.grid;
  const int32_t qmin = run.qmin, qmax = run.qmax;
  float* const columns = run.columns;
  GridVector uniform = {};
  if constexpr (!kPerElement) {
    uniform = grid_vector(_mm512_set1_ps(span.inv_scale[0]), _mm512_set1_epi32(span.zero_point[0]),
                          qmin, qmax);
  }
  __m512 scale_sum = _mm512_setzero_ps(), zero_sum = _mm512_setzero_ps();
  const auto step = [&](int64_t i, __mmask16 m, auto streams) __attribute__((always_inline)) {
    GridVector grid = uniform;
    if constexpr (kPerElement) {
      grid = grid_vector(_mm512_maskz_loadu_ps(m, span.inv_scale + i),
                         _mm512_maskz_loadu_epi32(m, span.zero_point + i), qmin, qmax);
    }
    const __m512 v = _mm512_mul_ps(load(x + i, m), grid.inv_scale);
    const __m512 r =
        kClips ? v : _mm512_roundscale_ps(v, kNearestEven);  // a clip does not round: r - v is 0
    const __mmask16 passes =
        _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(r, grid.lo, _CMP_GE_OQ), r, grid.hi, _CMP_LE_OQ);
    if constexpr (kSums) {
      const __m512 g = load(grad + i, m);
      const __m512 clamped = _mm512_min_ps(_mm512_max_ps(r, grid.lo), grid.hi);  // NaN: lo
      const __m512 term = _mm512_mul_ps(g, _mm512_mask_sub_ps(clamped, passes, r, v));
      const __mmask16 blocked = _knot_mask16(passes);
      if constexpr (kPerElement) {
        float* zero_columns = columns + kGridBlock;
        const __m512 scale_old = _mm512_maskz_loadu_ps(m, columns + i);
        const __m512 zero_old = _mm512_maskz_loadu_ps(m, zero_columns + i);
        _mm512_mask_storeu_ps(columns + i, m, _mm512_add_ps(scale_old, term));
        _mm512_mask_storeu_ps(zero_columns + i, m,
                              _mm512_mask_add_ps(zero_old, blocked, zero_old, g));
      } else {
        scale_sum = _mm512_add_ps(scale_sum, term);
        zero_sum = _mm512_mask_add_ps(zero_sum, blocked, zero_sum, g);
      }
    }
    store_passing<streams()>(out + i, grad + i, passes, m);
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    step(i, 0xffff, std::bool_constant<kStream>{});
    step(i + 16, 0xffff, std::bool_constant<kStream>{});
  }
  if (i < n) step(i, lanes(n - i), std::false_type{});
  if (i + 16 < n) step(i + 16, lanes(n - i - 16), std::false_type{});
  if constexpr (kSums && !kPerElement) {
    alignas(64) float sums[2][kSumLanes];
    _mm512_store_ps(sums[0], scale_sum);
    _mm512_store_ps(sums[1], zero_sum);
    for (int k = 0; k < 2; ++k) run.partial[k] = sum_lanes(sums[k]);
  }
}

template <typename T, bool kStream>
QK_INLINE void backward_with(const FakeQuantBackwardRun& run) {
  if (run.columns != nullptr) {
    run.clips ? backward_run<T, true, true, kStream, true>(run)
              : backward_run<T, true, true, kStream>(run);
  } else if (run.partial != nullptr) {
    run.clips ? backward_run<T, true, false, kStream, true>(run)
              : backward_run<T, true, false, kStream>(run);
  } else if (run.grid.per_element) {
    backward_run<T, false, true, kStream>(run);
  } else {
    backward_run<T, false, false, kStream>(run);
  }
}

template <typename T>
QK_INLINE void backward_any(const FakeQuantBackwardRun& run) {
  if (run.stream && reinterpret_cast<uintptr_t>(run.out) % 64 == 0) {
    backward_with<T, true>(run);
  } else {
    backward_with<T, false>(run);
  }
}

}  // namespace

void fake_quant_backward_f32_avx512vnni(const FakeQuantBackwardRun& run) {
  backward_any<float>(run);
}
void fake_quant_backward_bf16_avx512vnni(const FakeQuantBackwardRun& run) {
  backward_any<BFloat16>(run);
}
void fake_quant_backward_f16_avx512vnni(const FakeQuantBackwardRun& run) {
  backward_any<Float16>(run);
}

}  // namespace qk
QK_TARGET_END
