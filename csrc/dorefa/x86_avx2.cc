#include "csrc/base/x86_avx2.h"

#include "csrc/dorefa/dorefa.h"
#include "csrc/fake_quant/fake_quant.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

struct Noise {
  QK_INLINE __m256i mix(__m256i h) {
    h = _mm256_xor_si256(h, _mm256_srli_epi32(h, 16));
    h = _mm256_mullo_epi32(h, _mm256_set1_epi32(static_cast<int32_t>(0x85ebca6bu)));
    h = _mm256_xor_si256(h, _mm256_srli_epi32(h, 13));
    h = _mm256_mullo_epi32(h, _mm256_set1_epi32(static_cast<int32_t>(0xc2b2ae35u)));
    return _mm256_xor_si256(h, _mm256_srli_epi32(h, 16));
  }
  // uniform_noise of elements index, index + 1, ... of a row.
  QK_INLINE Vec::F noise(NoiseKey key, int64_t index) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i inner = _mm256_set1_epi32(static_cast<int32_t>(key.inner));
    const __m256i outer = _mm256_set1_epi32(static_cast<int32_t>(key.outer));
    const __m256i counter = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(index)), lane);
    const __m256i h = mix(_mm256_add_epi32(mix(_mm256_xor_si256(counter, inner)), outer));
    return Vec::sub(Vec::mul(_mm256_cvtepi32_ps(_mm256_srli_epi32(h, 8)), Vec::set(0x1p-24f)),
                    Vec::set(0.5f));
  }
};

#include "csrc/dorefa/x86_dorefa.h"

}  // namespace

void dorefa_weight_f32_avx2(const DorefaWeightRun& run) { dorefa_weight_run<Vec, float>(run); }
void dorefa_backward_f32_avx2(const DorefaBackwardRun& run) {
  dorefa_backward_run<Vec, float>(run);
}
void dorefa_gradient_f32_avx2(const DorefaGradientRun& run) {
  dorefa_gradient_run<Vec, Noise, float>(run);
}
void dorefa_weight_bf16_avx2(const DorefaWeightRun& run) { dorefa_weight_run<Vec, BFloat16>(run); }
void dorefa_backward_bf16_avx2(const DorefaBackwardRun& run) {
  dorefa_backward_run<Vec, BFloat16>(run);
}
void dorefa_gradient_bf16_avx2(const DorefaGradientRun& run) {
  dorefa_gradient_run<Vec, Noise, BFloat16>(run);
}
void dorefa_weight_f16_avx2(const DorefaWeightRun& run) { dorefa_weight_run<Vec, Float16>(run); }
void dorefa_backward_f16_avx2(const DorefaBackwardRun& run) {
  dorefa_backward_run<Vec, Float16>(run);
}
void dorefa_gradient_f16_avx2(const DorefaGradientRun& run) {
  dorefa_gradient_run<Vec, Noise, Float16>(run);
}

}  // namespace qk
QK_TARGET_END
