// AVX2: a tile of up to 4 rows x 16 columns (8 x 8 in a narrow last panel), exact for all values.
//
// Trick: vpmaddubsw adds two products in int16 and saturates, but not if the positive weights of a
//   pair sum to at most 128 and the negative ones to at least -128 (255 * 128 < 2^15). Packing
//   therefore sorts the quads of a panel: first those that are safe for all columns, which take
//   three instructions, then the rest, which are widened to int16 (even and odd bytes apart) for
//   vpmaddwd. `order` holds the number of safe quads and the offset in A of each quad.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/gemm/igemm.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

#include "csrc/gemm/x86_driver.h"

#include "csrc/gemm/x86_avx2_epilogue.h"
#include "csrc/gemm/x86_ymm_tile.h"

// `Flip`: A is int8.
template <bool Flip>
struct Avx2Multiply {
  static constexpr int64_t kWideRows = 4;

  template <int R, int V>
  QK_INLINE void run(const IgemmTile& tile, __m256i (&acc)[R][V]) {
    const PackedHeader& header = *tile.matrix.header;
    const int64_t taps = header.taps, quads = header.depth / 4, tail = header.depth % 4;
    const __m256i* b = reinterpret_cast<const __m256i*>(tile.panel);
    const int32_t* order = tile.matrix.order + tile.panel_index * taps * (1 + quads);
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      const __m256i init = _mm256_load_si256(
          reinterpret_cast<const __m256i*>(tile.matrix.init + tile.first_column + 8 * j));
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) acc[i][j] = init;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* p[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) p[i] = tile.rows[i * taps + tap];
      const int32_t* const safe_end = order + 1 + order[0];
      const int32_t* const end = order + 1 + quads;
      const int32_t* at = order + 1;
      for (; at != safe_end; ++at, b += V) safe_quad<R, V>(acc, p, *at, b);
      for (; at != end; ++at, b += V) {
        __m256i a[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) a[i] = broadcast4(p[i] + *at);
        wide_quad<R, V>(acc, a, b);
      }
      order = end;
      if (tail != 0) {
        __m256i a[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) a[i] = broadcast_tail(p[i] + 4 * quads, tail);
        wide_quad<R, V>(acc, a, b);
        b += V;
      }
    }
  }

  QK_INLINE __m256i flipped(__m256i a) {
    return Flip ? _mm256_xor_si256(a, _mm256_set1_epi8(static_cast<char>(0x80))) : a;
  }

  template <int R, int V>
  QK_INLINE void safe_quad(__m256i (&acc)[R][V], const uint8_t* const (&p)[R], int64_t offset,
                           const __m256i* b) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i bv[V];
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) bv[j] = _mm256_load_si256(b + j);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m256i a = flipped(broadcast4(p[i] + offset));
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) {
        acc[i][j] =
            _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, bv[j]), ones));
      }
    }
  }

  template <int R, int V>
  QK_INLINE void wide_quad(__m256i (&acc)[R][V], const __m256i (&bytes)[R], const __m256i* b) {
    __m256i even[V], odd[V];
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      const __m256i bv = _mm256_load_si256(b + j);
      even[j] = _mm256_srai_epi16(_mm256_slli_epi16(bv, 8), 8);
      odd[j] = _mm256_srai_epi16(bv, 8);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m256i a = flipped(bytes[i]);
      const __m256i a_even = _mm256_and_si256(a, _mm256_set1_epi16(0xff));
      const __m256i a_odd = _mm256_srli_epi16(a, 8);
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) {
        acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(a_even, even[j]));
        acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(a_odd, odd[j]));
      }
    }
  }
};

}  // namespace

void igemm_avx2(const IgemmBlock& block) {
  if (block.args.matrix.header->input_signed) {
    igemm_blocks<YmmTile<Avx2Multiply<true>, Isa::kAvx2>>(block);
  } else {
    igemm_blocks<YmmTile<Avx2Multiply<false>, Isa::kAvx2>>(block);
  }
}

}  // namespace qk
QK_TARGET_END
