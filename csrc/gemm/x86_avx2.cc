// AVX2: a tile of up to 6 rows x 16 columns (8 x 8 in a narrow last panel), exact for all values.
//
// Trick: vpmaddubsw, the dot product of bytes, saturates; vpmaddwd, that of int16, does not, and
//   with the sum takes two instructions for two products a lane. The rows of a block are widened to
//   int16 once for the panels that L2 holds, which also flips int8 and joins the taps; the weights
//   stay bytes in memory and are widened as they are loaded, once for all rows of a tile. Sorting
//   out the weights on which vpmaddubsw is exact is slower: of a trained layer only half are.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/gemm/igemm.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

#include "csrc/gemm/x86_driver.h"

#include "csrc/gemm/x86_avx2_epilogue.h"
#include "csrc/gemm/x86_ymm_tile.h"

// Values of the rows of a block, on the stack: eight rows in nearly all layers, a single one in
// any.
constexpr int64_t kFewDepth = 4096, kFewValues = 8 * kFewDepth, kManyValues = kMaxKS8S8 + 1;
static_assert(kFewValues >= kBlockBytes / 2);

QK_INLINE int64_t padded_depth(const PackedHeader& header) {
  return (header.taps * header.depth + 1) / 2 * 2;
}

template <bool Flip>
QK_INLINE void widen16(const uint8_t* from, int16_t* to) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if (Flip) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvtepu8_epi16(bytes));
}

template <bool Flip>
QK_INLINE void widen8(const uint8_t* from, int16_t* to) {
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  if (Flip) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_cvtepu8_epi16(bytes));
}

// `n` bytes as int16; the last vector may repeat some values of the one before.
template <bool Flip>
QK_INLINE void widen(const uint8_t* from, int64_t n, int16_t* to) {
  if (n >= 16) {
    for (int64_t i = 0; i + 16 <= n; i += 16) widen16<Flip>(from + i, to + i);
    if (n % 16 != 0) widen16<Flip>(from + n - 16, to + n - 16);
  } else if (n >= 8) {
    widen8<Flip>(from, to);
    widen8<Flip>(from + n - 8, to + n - 8);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int16_t>(Flip ? from[i] ^ 0x80 : from[i]);
  }
}

// `Flip`: A is int8.
template <bool Flip, int64_t kValues>
struct WideRows {
  QK_INLINE int64_t row_bytes(const PackedHeader& header) { return 2 * padded_depth(header); }

  __attribute__((noinline)) void take(const PackedHeader& header, int64_t count,
                                      const uint8_t* const** sources, int64_t* row_pitch) {
    const int64_t taps = header.taps, depth = header.depth, padded = padded_depth(header);
    for (int64_t i = 0; i < count; ++i) {
      int16_t* row = values + i * padded;
      rows[i] = reinterpret_cast<const uint8_t*>(row);
      for (int64_t tap = 0; tap < taps; ++tap) {
        widen<Flip>((*sources)[i * *row_pitch + tap], depth, row + tap * depth);
      }
      if (padded > taps * depth) row[padded - 1] = 0;
    }
    *sources = rows;
    *row_pitch = 1;
  }

  alignas(64) int16_t values[kValues];
  const uint8_t* rows[kMaxBlockRows];
};

// acc += pairwise products of a and b; one asm so that gcc neither reorders nor spills.
QK_INLINE void add_products(__m256i& acc, __m256i a, __m256i b) {
  __m256i products;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(a), "x"(b));
}

QK_INLINE __m256i broadcast_pair(const uint8_t* row, int64_t pair) {
  int32_t values;
  __builtin_memcpy(&values, row + 4 * pair, 4);
  return _mm256_set1_epi32(values);
}

template <bool Flip, int64_t kValues>
struct Avx2Multiply {
  using Copy = WideRows<Flip, kValues>;

  static int64_t rows_held(const PackedHeader& header) {
    const int64_t depth = padded_depth(header);
    return depth == 0 ? kMaxBlockRows : kValues / depth;
  }

  template <int R, int V>
  QK_INLINE void run(const IgemmTile& tile, __m256i (&acc)[R][V]) {
    const int64_t pairs = padded_depth(*tile.matrix->header) / 2;
    const auto* b = reinterpret_cast<const __m128i*>(tile.panel);
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      const __m256i init = _mm256_load_si256(
          reinterpret_cast<const __m256i*>(tile.matrix->init + tile.first_column + 8 * j));
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) acc[i][j] = init;
    }
    const uint8_t* p[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) p[i] = tile.rows[i];
    for (int64_t k = 0; k < pairs; ++k, b += V) {
      __m256i bv[V];
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) bv[j] = _mm256_cvtepi8_epi16(_mm_load_si128(b + j));
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const __m256i av = broadcast_pair(p[i], k);
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) add_products(acc[i][j], av, bv[j]);
      }
    }
  }
};

// A function for each: the stack of the larger is a quarter of a megabyte.
template <bool Flip, int64_t kValues>
__attribute__((noinline)) void run_blocks(const IgemmBlock& block) {
  igemm_blocks<YmmTile<Avx2Multiply<Flip, kValues>, Isa::kAvx2>>(block);
}

template <bool Flip>
QK_INLINE void run(const IgemmBlock& block) {
  const bool few = padded_depth(*block.args.matrix.header) <= kFewDepth;
  few ? run_blocks<Flip, kFewValues>(block) : run_blocks<Flip, kManyValues>(block);
}

}  // namespace

void igemm_avx2(const IgemmBlock& block) {
  block.args.matrix.header->input_signed ? run<true>(block) : run<false>(block);
}

}  // namespace qk
QK_TARGET_END
