// AVX-VNNI: a tile of up to 6 rows x 16 columns (8 x 8 in a narrow last panel).
//
// Trick: as x86_avx512vnni.cc with 16 registers: 12 accumulators, two vectors of B, one of A.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/gemm/igemm.h"

QK_TARGET_BEGIN(QK_ISA_AVXVNNI)
namespace qk {
namespace {

#include "csrc/base/x86_avxvnni.h"

#include "csrc/gemm/x86_driver.h"

#include "csrc/gemm/x86_avx2_epilogue.h"
#include "csrc/gemm/x86_ymm_store.h"
#include "csrc/gemm/x86_ymm_tile.h"

// The last quad of a row of `depth` bytes, no multiple of 4; see overlaps_tail().
QK_INLINE __m256i broadcast_tail(const uint8_t* row, int64_t depth) {
  if (depth > 4) return broadcast4(row + depth - 4);
  int32_t bytes = row[0];
  if (depth > 1) bytes |= row[1] << 8;
  if (depth > 2) bytes |= row[2] << 16;
  return _mm256_set1_epi32(bytes);
}

constexpr int sums_in_flight(int tile) { return tile > 6 ? 1 : tile > 3 ? 2 : 4; }

// `Flip`: A is int8.
template <bool Flip>
struct AvxVnniMultiply {
  static constexpr int64_t kMaxRows = 6, kMaxNarrowRows = 8;

  template <int R, int V>
  QK_INLINE void run(const YmmPanel& panel, const uint8_t* const* rows, __m256i (&acc)[R][V]) {
    constexpr int S = sums_in_flight(R * V);
    const int64_t taps = panel.taps, quads = panel.depth / 4, tail = panel.depth % 4;
    const __m256i* b = reinterpret_cast<const __m256i*>(panel.weights);
    __m256i sum[S][R][V];
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      const __m256i init = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel.init + 8 * j));
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) sum[s][i][j] = s == 0 ? init : _mm256_setzero_si256();
      }
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* p[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) p[i] = rows[i * taps + tap];
      int64_t k = 0;
      for (; k + S <= quads; k += S) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) quad<R, V>(sum[s], p, 4 * (k + s), b + s * V);
        b += S * V;
      }
      if constexpr (S > 1) {
        for (; k < quads; ++k, b += V) quad<R, V>(sum[0], p, 4 * k, b);
      }
      if (tail != 0) {
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          const __m256i a = flipped(broadcast_tail(p[i], panel.depth));
#pragma GCC unroll 2
          for (int j = 0; j < V; ++j) dot_bytes(sum[0][i][j], a, _mm256_load_si256(b + j));
        }
        b += V;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) {
        acc[i][j] = sum[0][i][j];
#pragma GCC unroll 4
        for (int s = 1; s < S; ++s) acc[i][j] = _mm256_add_epi32(acc[i][j], sum[s][i][j]);
      }
    }
  }

  QK_INLINE __m256i flipped(__m256i a) {
    return Flip ? _mm256_xor_si256(a, _mm256_set1_epi8(static_cast<char>(0x80))) : a;
  }

  // Four values of k: the bytes at p[i] + offset with one packed quad.
  template <int R, int V>
  QK_INLINE void quad(__m256i (&sum)[R][V], const uint8_t* const (&p)[R], int64_t offset,
                      const __m256i* b) {
    __m256i bv[V];
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) bv[j] = _mm256_load_si256(b + j);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m256i a = flipped(broadcast4(p[i] + offset));
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) dot_bytes(sum[i][j], a, bv[j]);
    }
  }
};

}  // namespace

void igemm_avxvnni(const IgemmBlock& block) {
  if (block.args.matrix.header->input_signed) {
    igemm_blocks<YmmTile<AvxVnniMultiply<true>, InPlace, Isa::kAvxVnni>>(block);
  } else {
    igemm_blocks<YmmTile<AvxVnniMultiply<false>, InPlace, Isa::kAvxVnni>>(block);
  }
}

}  // namespace qk
QK_TARGET_END
