#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/fake_quant/fake_quant.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {

void fake_quant_f32_avx512vnni(const float* x, float* y, int64_t n, float scale, int32_t zero_point,
                               int32_t qmin, int32_t qmax) {
  constexpr int kRoundNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 vinv = _mm512_set1_ps(1.0f / scale), vscale = _mm512_set1_ps(scale);
  const __m512 lo = _mm512_set1_ps(static_cast<float>(qmin - zero_point));
  const __m512 hi = _mm512_set1_ps(static_cast<float>(qmax - zero_point));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m512 v = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), vinv),
                                          kRoundNearestEven);
    const __m512 q = _mm512_min_ps(_mm512_max_ps(v, lo), hi);
    _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(q, vscale));
  }
}

}  // namespace qk
QK_TARGET_END
