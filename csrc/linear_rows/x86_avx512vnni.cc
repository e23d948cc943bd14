#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/linear_rows/linear_rows.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

#include "csrc/gemm/x86_avx512_epilogue.h"

}  // namespace

void scale_rows_avx512vnni(const ScaleRun& run) {
  const __m512i zero_point = _mm512_set1_epi32(run.zero_point);
  const __m512 scale = _mm512_set1_ps(run.scale);
  const int64_t bytes = output_bytes(run.output);
  for (int64_t i = 0; i < run.n; i += 16) {
    const __mmask16 mask = mask16(run.n - i);
    const __m512i sum = _mm512_maskz_loadu_epi32(mask, run.weight_sum + i);
    const __m512i centered = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(mask, run.acc + i),
                                              _mm512_mullo_epi32(zero_point, sum));
    const __m512 mult = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, run.weight_scale + i));
    const __m512 bias =
        run.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, run.bias + i);
    const __m512 v = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(centered), mult), bias);
    store_floats_x16(run.output, v, static_cast<char*>(run.out) + i * bytes, mask);
  }
}

}  // namespace qk
QK_TARGET_END
