#include <immintrin.h>

#include "csrc/base/numerics.h"
#include "csrc/base/target.h"
#include "csrc/fake_quant/fake_quant.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {

void fake_quant_f32_avx2(const float* x, float* y, int64_t n, float scale, int32_t zero_point,
                         int32_t qmin, int32_t qmax) {
  const float inv_scale = 1.0f / scale;
  const __m256 vinv = _mm256_set1_ps(inv_scale), vscale = _mm256_set1_ps(scale);
  const __m256 lo = _mm256_set1_ps(static_cast<float>(qmin - zero_point));
  const __m256 hi = _mm256_set1_ps(static_cast<float>(qmax - zero_point));
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_round_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), vinv),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 q = _mm256_min_ps(_mm256_max_ps(v, lo), hi);
    _mm256_storeu_ps(y + i, _mm256_mul_ps(q, vscale));
  }
  for (; i < n; ++i) y[i] = fake_quant(x[i], scale, inv_scale, zero_point, qmin, qmax);
}

}  // namespace qk
QK_TARGET_END
