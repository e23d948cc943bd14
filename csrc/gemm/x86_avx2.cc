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

// acc += pairwise sums of a * b in int16; one asm so that gcc neither reorders nor spills.
QK_INLINE void add_products(__m256i& acc, __m256i a, __m256i b) {
  __m256i products;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(a), "x"(b));
}

// `Flip`: A is int8.
template <bool Flip>
struct Avx2Multiply {
  static constexpr int64_t kWideRows = 4;

  template <int R, int V>
  QK_INLINE void run(const IgemmTile& tile, __m256i (&acc)[R][V]) {
    const PackedHeader& header = *tile.matrix->header;
    const int64_t taps = header.taps, quads = header.depth / 4, tail = header.depth % 4;
    const __m256i* b = reinterpret_cast<const __m256i*>(tile.panel);
    const int32_t* order = tile.matrix->order + tile.panel_index * taps * (1 + quads);
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      const __m256i init = _mm256_load_si256(
          reinterpret_cast<const __m256i*>(tile.matrix->init + tile.first_column + 8 * j));
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
        int64_t offset = *at;
        const __m256i* quad = b;
        wide_bytes<R, V, false>(acc, quad, [&](int i) { return broadcast4(p[i] + offset); });
        // Loaded twice: gcc would keep the bytes for the other half, and spill accumulators.
        __asm__("" : "+r"(offset), "+r"(quad));
        wide_bytes<R, V, true>(acc, quad, [&](int i) { return broadcast4(p[i] + offset); });
      }
      order = end;
      if (tail != 0) {
        const auto load = [&](int i) { return broadcast_tail(p[i], header.depth); };
        wide_bytes<R, V, false>(acc, b, load);
        wide_bytes<R, V, true>(acc, b, load);
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
        add_products(acc[i][j], _mm256_maddubs_epi16(a, bv[j]), ones);
      }
    }
  }

  // Without a mask if there is a flip: both constants do not fit the registers.
  QK_INLINE __m256i even_bytes(__m256i a) {
    return Flip ? _mm256_srli_epi16(_mm256_slli_epi16(a, 8), 8)
                : _mm256_and_si256(a, _mm256_set1_epi16(0xff));
  }

  // The even or the odd bytes of a quad, widened to int16. One after the other: together their
  // operands do not fit the registers. `load(i)` gives the four bytes of row i.
  template <int R, int V, bool Odd, typename Load>
  QK_INLINE void wide_bytes(__m256i (&acc)[R][V], const __m256i* b, const Load& load) {
    __m256i bv[V];
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      bv[j] = _mm256_load_si256(b + j);
      bv[j] = _mm256_srai_epi16(Odd ? bv[j] : _mm256_slli_epi16(bv[j], 8), 8);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m256i bytes = flipped(load(i));
      const __m256i a = Odd ? _mm256_srli_epi16(bytes, 8) : even_bytes(bytes);
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) {
        add_products(acc[i][j], a, bv[j]);
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
