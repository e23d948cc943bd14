// 8 elements a vector, two vectors of sums; the last 7 elements one by one.
#include "csrc/base/x86_avx2.h"

#include "csrc/fake_quant_backward/backward.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

struct GridVector {
  __m256 inv_scale, lo, hi;
};

QK_INLINE GridVector grid_vector(__m256 inv_scale, __m256i zp, int32_t qmin, int32_t qmax) {
  return {inv_scale, _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32(qmin), zp)),
          _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32(qmax), zp))};
}

// out = passes ? grad : 0, bit by bit; `passes` is a mask of 8 x 32 bits.
template <bool kStream>
QK_INLINE void store_passing(float* out, const float* grad, __m256 passes) {
  const __m256 v = _mm256_and_ps(passes, _mm256_loadu_ps(grad));
  kStream ? _mm256_stream_ps(out, v) : _mm256_storeu_ps(out, v);
}
template <bool kStream, typename Half>
QK_INLINE void store_passing(Half* out, const Half* grad, __m256 passes) {
  const __m256i wide = _mm256_castps_si256(passes);
  const __m128i narrow =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const __m128i v = _mm_and_si128(narrow, load128(grad));
  __m128i* target = reinterpret_cast<__m128i*>(out);
  kStream ? _mm_stream_si128(target, v) : _mm_storeu_si128(target, v);
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
    uniform = grid_vector(_mm256_set1_ps(span.inv_scale[0]), _mm256_set1_epi32(span.zero_point[0]),
                          qmin, qmax);
  }
  __m256 scale_0 = _mm256_setzero_ps(), scale_1 = _mm256_setzero_ps();
  __m256 zero_0 = _mm256_setzero_ps(), zero_1 = _mm256_setzero_ps();
  const auto step = [&](int64_t i, __m256& scale_sum,
                        __m256& zero_sum) __attribute__((always_inline)) {
    GridVector grid = uniform;
    if constexpr (kPerElement) {
      grid = grid_vector(_mm256_loadu_ps(span.inv_scale + i), load256(span.zero_point + i), qmin,
                         qmax);
    }
    const __m256 v = _mm256_mul_ps(load(x + i), grid.inv_scale);
    const __m256 r =
        kClips ? v : _mm256_round_ps(v, kNearestEven);  // a clip does not round: r - v is 0
    const __m256 passes =
        _mm256_and_ps(_mm256_cmp_ps(r, grid.lo, _CMP_GE_OQ), _mm256_cmp_ps(r, grid.hi, _CMP_LE_OQ));
    if constexpr (kSums) {
      const __m256 g = load(grad + i);
      const __m256 clamped = _mm256_min_ps(_mm256_max_ps(r, grid.lo), grid.hi);  // NaN: lo
      const __m256 term = _mm256_mul_ps(g, _mm256_blendv_ps(clamped, _mm256_sub_ps(r, v), passes));
      const __m256 blocked = _mm256_andnot_ps(passes, g);
      if constexpr (kPerElement) {
        float* zero_columns = columns + kGridBlock;
        _mm256_storeu_ps(columns + i, _mm256_add_ps(_mm256_loadu_ps(columns + i), term));
        _mm256_storeu_ps(zero_columns + i,
                         _mm256_add_ps(_mm256_loadu_ps(zero_columns + i), blocked));
      } else {
        scale_sum = _mm256_add_ps(scale_sum, term);
        zero_sum = _mm256_add_ps(zero_sum, blocked);
      }
    }
    store_passing<kStream>(out + i, grad + i, passes);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    step(i, scale_0, zero_0);
    step(i + 8, scale_1, zero_1);
  }
  if (i + 8 <= n) step(i, scale_0, zero_0);
  i += (n - i) & ~int64_t{7};
  if constexpr (kSums && !kPerElement) {
    alignas(32) float sums[2][kSumLanes];
    _mm256_store_ps(sums[0], scale_0);
    _mm256_store_ps(sums[0] + 8, scale_1);
    _mm256_store_ps(sums[1], zero_0);
    _mm256_store_ps(sums[1] + 8, zero_1);
    for (int64_t k = i; k < n; ++k) {
      backward_element<T>(run, k, sums[0] + k % kSumLanes, sums[1] + k % kSumLanes);
    }
    for (int k = 0; k < 2; ++k) run.partial[k] = sum_lanes(sums[k]);
  } else {
    // The mask tells gcc that the tail is short, or it vectorizes it.
    for (int64_t end = i + ((n - i) & 7); i < end; ++i) {
      backward_element<T>(run, i, kSums ? columns + i : nullptr, columns + kGridBlock + i);
    }
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
  if (run.stream && reinterpret_cast<uintptr_t>(run.out) % 32 == 0) {
    backward_with<T, true>(run);
  } else {
    backward_with<T, false>(run);
  }
}

}  // namespace

void fake_quant_backward_f32_avx2(const FakeQuantBackwardRun& run) { backward_any<float>(run); }
void fake_quant_backward_bf16_avx2(const FakeQuantBackwardRun& run) { backward_any<BFloat16>(run); }
void fake_quant_backward_f16_avx2(const FakeQuantBackwardRun& run) { backward_any<Float16>(run); }

}  // namespace qk
QK_TARGET_END
