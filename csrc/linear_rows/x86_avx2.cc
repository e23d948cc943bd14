#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/linear_rows/linear_rows.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

#include "csrc/gemm/x86_avx2_epilogue.h"

QK_INLINE __m256i lane_mask_x8(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
QK_INLINE __m256i load_ints(const int32_t* p, __m256i mask) {
  return _mm256_maskload_epi32(p, mask);
}
QK_INLINE __m256 load_floats(const float* p, __m256i mask) { return _mm256_maskload_ps(p, mask); }

}  // namespace

void scale_rows_avx2(const ScaleRun& run) {
  const __m256i zero_point = _mm256_set1_epi32(run.zero_point);
  const __m256 scale = _mm256_set1_ps(run.scale);
  const int64_t bytes = output_bytes(run.output);
  for (int64_t i = 0; i < run.n; i += 8) {
    const __m256i mask = lane_mask_x8(run.n - i);
    const __m256i offset = _mm256_mullo_epi32(zero_point, load_ints(run.weight_sum + i, mask));
    const __m256i centered = _mm256_sub_epi32(load_ints(run.acc + i, mask), offset);
    const __m256 mult = _mm256_mul_ps(scale, load_floats(run.weight_scale + i, mask));
    const __m256 bias = run.bias == nullptr ? _mm256_setzero_ps() : load_floats(run.bias + i, mask);
    const __m256 v = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(centered), mult), bias);
    store_floats_x8(run.output, v, static_cast<char*>(run.out) + i * bytes, run.n - i);
  }
}

}  // namespace qk
QK_TARGET_END
