#include "csrc/base/x86_avx512.h"

#include "csrc/dorefa/dorefa.h"
#include "csrc/fake_quant/fake_quant.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

struct Noise {
  QK_INLINE __m512i mix(__m512i h) {
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
    h = _mm512_mullo_epi32(h, _mm512_set1_epi32(static_cast<int32_t>(0x85ebca6bu)));
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 13));
    h = _mm512_mullo_epi32(h, _mm512_set1_epi32(static_cast<int32_t>(0xc2b2ae35u)));
    return _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
  }
  // uniform_noise of elements index, index + 1, ... of a row.
  QK_INLINE Vec::F noise(NoiseKey key, int64_t index) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i inner = _mm512_set1_epi32(static_cast<int32_t>(key.inner));
    const __m512i outer = _mm512_set1_epi32(static_cast<int32_t>(key.outer));
    const __m512i counter = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(index)), lane);
    const __m512i h = mix(_mm512_add_epi32(mix(_mm512_xor_si512(counter, inner)), outer));
    return Vec::sub(Vec::mul(_mm512_cvtepi32_ps(_mm512_srli_epi32(h, 8)), Vec::set(0x1p-24f)),
                    Vec::set(0.5f));
  }
};

#include "csrc/dorefa/x86_dorefa.h"

}  // namespace

void dorefa_weight_f32_avx512vnni(const DorefaWeightRun& run) {
  dorefa_weight_run<Vec, float>(run);
}
void dorefa_backward_f32_avx512vnni(const DorefaBackwardRun& run) {
  dorefa_backward_run<Vec, float>(run);
}
void dorefa_gradient_f32_avx512vnni(const DorefaGradientRun& run) {
  dorefa_gradient_run<Vec, Noise, float>(run);
}
void dorefa_weight_bf16_avx512vnni(const DorefaWeightRun& run) {
  dorefa_weight_run<Vec, BFloat16>(run);
}
void dorefa_backward_bf16_avx512vnni(const DorefaBackwardRun& run) {
  dorefa_backward_run<Vec, BFloat16>(run);
}
void dorefa_gradient_bf16_avx512vnni(const DorefaGradientRun& run) {
  dorefa_gradient_run<Vec, Noise, BFloat16>(run);
}
void dorefa_weight_f16_avx512vnni(const DorefaWeightRun& run) {
  dorefa_weight_run<Vec, Float16>(run);
}
void dorefa_backward_f16_avx512vnni(const DorefaBackwardRun& run) {
  dorefa_backward_run<Vec, Float16>(run);
}
void dorefa_gradient_f16_avx512vnni(const DorefaGradientRun& run) {
  dorefa_gradient_run<Vec, Noise, Float16>(run);
}

}  // namespace qk
QK_TARGET_END
