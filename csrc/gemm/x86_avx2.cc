// AVX2 for weights laid out as pairs, which no steps suit (x86_avx2_steps.cc): a tile of up to 4
// rows x 16 columns (8 x 8 in a narrow last panel), exact for all values.
//
// Trick: vpmaddubsw, the dot product of bytes, saturates; vpmaddwd, that of int16, does not, but
//   has half the products and only two of four pipes. Winograd's inner product (S. Winograd, A New
//   Algorithm for Inner Product, IEEE Trans. Computers C-17, 1968) has one product for two:
//     a0 w0 + a2 w2 = (a0 + w2)(a2 + w0) - a0 a2 - w0 w2,
//   where int16 holds the sums of bytes. What is subtracted is a sum for each row, and one for each
//   column, which packing puts where the sums start. All of it is modulo 2^32, so only the true sum
//   must fit. The rows of a block are widened to int16 once for the panels that L2 holds, which
//   also flips int8 and joins the taps; the weights stay bytes in memory and are widened as they
//   are loaded, once for all rows of a tile.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/gemm/byte_steps.h"
#include "csrc/gemm/igemm.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

#include "csrc/gemm/x86_driver.h"

#include "csrc/gemm/x86_avx2_epilogue.h"
#include "csrc/gemm/x86_copy_overlapping.h"
#include "csrc/gemm/x86_ymm_store.h"
#include "csrc/gemm/x86_ymm_tile.h"

// Values of the rows of a block, on the stack: eight rows in nearly all layers, a single one in
// any. Behind the values of a row is the int32 that its sums are too large by.
constexpr int64_t kCorrection = 2, kFewDepth = 4096;
constexpr int64_t kFewValues = 8 * (kFewDepth + kCorrection);
constexpr int64_t kManyValues = kMaxColumn + 7 + kCorrection;
static_assert(kFewValues >= kBlockBytes / 2);

QK_INLINE int64_t padded_depth(int64_t taps, int64_t depth) { return (taps * depth + 7) / 8 * 8; }

template <bool Flip>
QK_INLINE __m256i widen16(const uint8_t* from, int16_t* to) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if (Flip) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
  const __m256i words = _mm256_cvtepu8_epi16(bytes);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
  return words;
}

template <bool Flip>
QK_INLINE __m128i widen8(const uint8_t* from, int16_t* to) {
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  if (Flip) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
  const __m128i words = _mm_cvtepu8_epi16(bytes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
  return words;
}

// Sums row[k] * row[k + 2] over the first two k of every four.
struct Crosses {
  QK_INLINE __m256i of(__m256i values) {  // each in two lanes
    return _mm256_madd_epi16(values, _mm256_shuffle_epi32(values, 0xb1));
  }
  QK_INLINE int32_t sum(__m256i v) {
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_unpackhi_epi64(half, half)));
  }
};

// `Flip`: A is int8.
template <bool Flip, int64_t kValues>
struct WideRows {
  QK_INLINE int64_t row_values(const PackedHeader& header) {
    return padded_depth(header.taps, header.depth) + kCorrection;
  }
  QK_INLINE int64_t row_bytes(const PackedHeader& header) { return 2 * row_values(header); }
  QK_INLINE int64_t rows_held(const PackedHeader& header) { return kValues / row_values(header); }

  __attribute__((noinline)) void take(const PackedHeader& header, int64_t count,
                                      const uint8_t* const** sources, int64_t* row_pitch) {
    const int64_t taps = header.taps, depth = header.depth, pitch = row_values(header);
    if (depth % 8 == 0 || taps == 0) {
      for (int64_t i = 0; i < count; ++i) {
        widen(*sources + i * *row_pitch, taps, depth, values + i * pitch);
      }
    } else {
      // All rows are joined before the first is widened: a load from parts of several stores waits
      // until they are in the cache.
      const int64_t joined_pitch = padded_depth(taps, depth);
      join_taps<8>(*sources, *row_pitch, count, taps, depth, joined_pitch, Flip ? 0x80 : 0, joined);
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t* row = joined + i * joined_pitch;
        widen(&row, 1, joined_pitch, values + i * pitch);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = reinterpret_cast<const uint8_t*>(values + i * pitch);
    }
    *sources = rows;
    *row_pitch = 1;
  }

  // A row and its crosses, for a depth that is a multiple of 8.
  QK_INLINE void widen(const uint8_t* const* taps, int64_t count, int64_t depth, int16_t* row) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t tap = 0; tap < count; ++tap) {
      const uint8_t *from = taps[tap], *end = from + depth;
      for (; from + 16 <= end; from += 16, row += 16) {
        sum = _mm256_add_epi32(sum, Crosses::of(widen16<Flip>(from, row)));
      }
      if (from < end) {
        sum = _mm256_add_epi32(sum, Crosses::of(_mm256_zextsi128_si256(widen8<Flip>(from, row))));
        row += 8;
      }
    }
    const int32_t crosses = Crosses::sum(sum);
    __builtin_memcpy(row, &crosses, 4);
  }

  alignas(64) int16_t values[kValues];
  uint8_t joined[kValues];
  const uint8_t* rows[kMaxBlockRows];
};

// acc += (a01 + w23) * (a23 + w01), summed in pairs; one asm so that gcc neither reorders nor
// spills.
QK_INLINE void add_products(__m256i& acc, __m256i a01, __m256i a23, __m256i w01, __m256i w23) {
  __m256i x, y;
  __asm__("vpaddw %6, %3, %1\n\tvpaddw %5, %4, %2\n\tvpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0"
          : "+x"(acc), "=&x"(x), "=&x"(y)
          : "x"(a01), "x"(a23), "x"(w01), "x"(w23));
}

// A single row reads the weights faster than the CPU fetches them by itself: so many bytes ahead.
constexpr int64_t kAhead = 2048;

struct Avx2Multiply {
  static constexpr int64_t kMaxRows = 4, kMaxNarrowRows = 8;

  template <int R, int V>
  QK_INLINE void run(const YmmPanel& panel, const uint8_t* const* rows, __m256i (&acc)[R][V]) {
    const auto* start = reinterpret_cast<const __m256i*>(panel.weights);
    const auto* b = reinterpret_cast<const __m128i*>(start + V);
    const int64_t bytes = 8 * ((panel.taps * panel.depth + 3) / 4);
    const int64_t correction = 2 * padded_depth(panel.taps, panel.depth);
    const uint8_t* p[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      p[i] = rows[i];
      const __m256i crosses = broadcast4(p[i] + correction);
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) {
        acc[i][j] = _mm256_sub_epi32(_mm256_load_si256(start + j), crosses);
      }
    }
    for (int64_t at = 0; at < bytes; at += 8, b += 2 * V) {
      if (R == 1) _mm_prefetch(reinterpret_cast<const char*>(b) + kAhead, _MM_HINT_T0);
      __m256i w01[V], w23[V];
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) {
        w01[j] = _mm256_cvtepi8_epi16(_mm_load_si128(b + j));
        w23[j] = _mm256_cvtepi8_epi16(_mm_load_si128(b + V + j));
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const __m256i a01 = broadcast4(p[i] + at), a23 = broadcast4(p[i] + at + 4);
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) add_products(acc[i][j], a01, a23, w01[j], w23[j]);
      }
    }
  }
};

// A function for each: the stack of the larger is 0.4 megabytes.
template <bool Flip, int64_t kValues>
__attribute__((noinline)) void run_blocks(const IgemmBlock& block) {
  igemm_blocks<YmmTile<Avx2Multiply, WideRows<Flip, kValues>, Isa::kAvx2>>(block);
}

template <bool Flip>
QK_INLINE void run(const IgemmBlock& block) {
  const PackedHeader& header = *block.args.matrix.header;
  const bool few = padded_depth(header.taps, header.depth) <= kFewDepth;
  few ? run_blocks<Flip, kFewValues>(block) : run_blocks<Flip, kManyValues>(block);
}

}  // namespace

void igemm_avx2(const IgemmBlock& block) {
  if (block.args.matrix.header->orders != 0) return igemm_avx2_steps(block);
  block.args.matrix.header->input_signed ? run<true>(block) : run<false>(block);
}

}  // namespace qk
QK_TARGET_END
