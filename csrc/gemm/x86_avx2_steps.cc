// AVX2 for weights packed in steps (byte_steps.h): a tile of 16 or 8 rows x 4 columns, or of a
// single row, exact for all values.
//
// Trick: vpmaddubsw has twice the products of vpmaddwd, the dot product of int16, but saturates; in
//   the order of the steps it cannot, and most of them add the int16 of two quads before they are
//   widened. A vector is eight rows and the weights are broadcast, so that a step has to suit four
//   columns only. The rows of a block are transposed, quad by quad, once for the panels that L2
//   holds, which also flips int8, joins the taps, and writes each order of the values that the
//   weights ask for.
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

#include "csrc/gemm/x86_avx2_column_store.h"
#include "csrc/gemm/x86_ymm_store.h"

constexpr int64_t kMostRows = 16, kVectorRows = 8, kFourRows = 4;

// Bytes of the rows of a block, on the stack: 16 rows in nearly all layers, a single one in any.
constexpr int64_t kFewDepth = 4096, kFewBytes = kMostRows * kFewDepth;
constexpr int64_t kManyBytes = 256 * 1024;
static_assert(kFewBytes >= kBlockBytes && kManyBytes >= kMaxColumn + 16);

QK_INLINE int64_t row_quads(const PackedHeader& header) {
  return kept_quads(header.taps * header.depth);
}

// The rows that are multiplied together, of the `left` last of a block: a few more than there are,
// where those take longer on their own.
QK_INLINE int64_t tile_rows(int64_t left, int64_t most) {
  if (left > 12 && most >= kMostRows) return kMostRows;
  if (left > 4 && most >= kVectorRows) return kVectorRows;
  return left > 2 && most >= kVectorRows ? kFourRows : 1;
}

// The values of each quad in another order.
template <int Order>
QK_INLINE __m256i ordered(__m256i quads) {
  constexpr const int (&from)[4] = kQuadOrder[Order];
  constexpr int kFirst = from[0] + 256 * (from[1] + 256 * (from[2] + 256 * from[3]));
  constexpr int kStep = 0x04040404;
  const __m256i pick =
      _mm256_setr_epi32(kFirst, kFirst + kStep, kFirst + 2 * kStep, kFirst + 3 * kStep, kFirst,
                        kFirst + kStep, kFirst + 2 * kStep, kFirst + 3 * kStep);
  return _mm256_shuffle_epi8(quads, pick);
}

// The rows of a block as [order][quad][rows of the tile][4], tile after tile. `Flip`: A is int8.
template <bool Flip, int64_t kBytes>
struct QuadRows {
  QK_INLINE int64_t row_bytes(const PackedHeader& header) {
    return 4 * row_quads(header) * header.orders;
  }
  QK_INLINE int64_t rows_held(const PackedHeader& header) {
    const int64_t bytes = row_bytes(header);
    return bytes == 0 ? kMostRows : kBytes / bytes;
  }

  __attribute__((noinline)) void take(const PackedHeader& header, int64_t count,
                                      const uint8_t* const** sources, int64_t* row_pitch) {
    const int64_t most = rows_held(header);
    uint8_t* to = values;
    for (int64_t row = 0; row < count;) {
      const int64_t size = tile_rows(count - row, most);
      const int64_t taken = count - row < size ? count - row : size;
      take_tile(header, *sources + row * *row_pitch, *row_pitch, taken, size, to);
      rows[row] = to;
      to += size * row_bytes(header);
      row += taken;
    }
    *sources = rows;
    *row_pitch = 1;
  }

  // A tile of `size` rows, of which `taken` exist.
  inline __attribute__((always_inline)) void take_tile(const PackedHeader& header,
                                                       const uint8_t* const* sources,
                                                       int64_t row_pitch, int64_t taken,
                                                       int64_t size, uint8_t* to) {
    int64_t taps = header.taps, depth = header.depth;
    const uint8_t* whole[kMostRows];
    if (taps * depth == 0) return;
    if (depth < 16 || depth % 4 != 0) {
      // All rows are joined before the first is read: a load from parts of several stores waits
      // until they are in the cache.
      const int64_t pitch = 4 * row_quads(header);
      join_taps<16>(sources, row_pitch, taken, taps, depth, pitch, Flip ? 0x80 : 0, joined);
      for (int64_t i = 0; i < taken; ++i) whole[i] = joined + i * pitch;
      sources = whole;
      row_pitch = taps = 1;
      depth = pitch;
    }
    const int64_t order_bytes = 4 * row_quads(header) * size;
    for (int64_t tap = 0; tap < taps; ++tap) {
      uint8_t* at = to + tap * depth * size;
      if (size == 1) {
        copy_row(header.orders, sources[tap], depth, at, order_bytes);
        continue;
      }
      for (int64_t first = 0; first < size; first += kVectorRows) {
        const uint8_t* eight[8];
        for (int64_t i = 0; i < kVectorRows; ++i) {
          const int64_t row = first + i < taken ? first + i : taken - 1;
          eight[i] = sources[row * row_pitch + tap];
        }
        if (size == kFourRows) {
          transpose<__m128i>(header.orders, eight, depth, at, 4 * size, order_bytes);
        } else {
          transpose<__m256i>(header.orders, eight, depth, at + 4 * first, 4 * size, order_bytes);
        }
      }
    }
  }

  // Sixteen bytes at a time, the last of them again where the depth is no multiple of that. Vectors
  // of eight rows, or of the first four.
  template <typename Vector>
  QK_INLINE void transpose(int64_t orders, const uint8_t* const (&from)[8], int64_t depth,
                           uint8_t* to, int64_t quad_bytes, int64_t order_bytes) {
    for (int64_t at = 0; at < depth; at += 16) {
      if (at > depth - 16) at = depth - 16;
      const FourVectors quads = dwords_of_rows(from, at);
      uint8_t* out = to + at / 4 * quad_bytes;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, out += quad_bytes) {
        __m256i v = quads.at[i];
        if (Flip) v = _mm256_xor_si256(v, _mm256_set1_epi8(static_cast<char>(0x80)));
        store<Vector>(out, v);
        if (orders == 1) continue;
        store<Vector>(out + order_bytes, ordered<1>(v));
        store<Vector>(out + 2 * order_bytes, ordered<2>(v));
      }
    }
  }
  template <typename Vector>
  QK_INLINE void store(uint8_t* to, __m256i v) {
    if constexpr (sizeof(Vector) == 32) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), v);
    } else {
      _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(v));
    }
  }

  QK_INLINE void copy_row(int64_t orders, const uint8_t* from, int64_t depth, uint8_t* to,
                          int64_t order_bytes) {
    for (int64_t at = 0; at < depth; at += 16) {
      if (at > depth - 16) at = depth - 16;
      __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
      if (Flip) v = _mm_xor_si128(v, _mm_set1_epi8(static_cast<char>(0x80)));
      const __m256i wide = _mm256_castsi128_si256(v);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + at), v);
      if (orders == 1) continue;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + order_bytes + at),
                       _mm256_castsi256_si128(ordered<1>(wide)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * order_bytes + at),
                       _mm256_castsi256_si128(ordered<2>(wide)));
    }
  }

  alignas(64) uint8_t values[kBytes];
  uint8_t joined[kBytes];
  const uint8_t* rows[kMaxBlockRows];
};

// The steps of four columns.
struct GroupSteps {
  GroupSteps(const PackedMatrix& matrix, int64_t group) {
    const auto* base = reinterpret_cast<const uint8_t*>(matrix.panels);
    ByteGroup head;
    __builtin_memcpy(&head, base + group * static_cast<int64_t>(sizeof(head)), sizeof(head));
    doubles = head.doubles, singles = head.singles;
    source = reinterpret_cast<const uint16_t*>(base + int64_t{head.at} * 32);
    weights =
        reinterpret_cast<const int32_t*>(source) + (2 * (2 * doubles + singles) + 31) / 32 * 8;
    init = matrix.init + group * kGroupColumns;
  }

  const uint16_t* source;
  const int32_t *weights, *init;
  int64_t doubles, singles;
};

QK_INLINE __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

alignas(32) constexpr int16_t kOneWords[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// acc += the products of one column in a double step, for one vector of rows and for two. In one
// asm, so that gcc neither reorders nor spills; with two vectors 16 registers leave none for
// `ones`.
QK_INLINE void add_double(__m256i (&acc)[1], const __m256i (&a)[1], const __m256i (&b)[1],
                          const int32_t* w, const int32_t* v, const __m256i& ones) {
  __m256i weight, sum, other;
  __asm__(
      "vpbroadcastd %6, %1\n\t"
      "vpmaddubsw %1, %4, %2\n\t"
      "vpbroadcastd %7, %1\n\t"
      "vpmaddubsw %1, %5, %3\n\t"
      "vpaddw %3, %2, %2\n\t"
      "vpmaddwd %8, %2, %2\n\t"
      "vpaddd %2, %0, %0"
      : "+x"(acc[0]), "=&x"(weight), "=&x"(sum), "=&x"(other)
      : "x"(a[0]), "x"(b[0]), "m"(*w), "m"(*v), "m"(ones));
}
QK_INLINE void add_double(__m256i (&acc)[2], const __m256i (&a)[2], const __m256i (&b)[2],
                          const int32_t* w, const int32_t* v, const __m256i& ones) {
  __m256i weight, sum0, sum1, other;
  __asm__(
      "vpbroadcastd %10, %2\n\t"
      "vpmaddubsw %2, %6, %3\n\t"
      "vpmaddubsw %2, %7, %4\n\t"
      "vpbroadcastd %11, %2\n\t"
      "vpmaddubsw %2, %8, %5\n\t"
      "vpaddw %5, %3, %3\n\t"
      "vpmaddubsw %2, %9, %5\n\t"
      "vpaddw %5, %4, %4\n\t"
      "vpmaddwd %12, %3, %3\n\t"
      "vpmaddwd %12, %4, %4\n\t"
      "vpaddd %3, %0, %0\n\t"
      "vpaddd %4, %1, %1"
      : "+x"(acc[0]), "+x"(acc[1]), "=&x"(weight), "=&x"(sum0), "=&x"(sum1), "=&x"(other)
      : "x"(a[0]), "x"(a[1]), "x"(b[0]), "x"(b[1]), "m"(*w), "m"(*v), "m"(ones));
}

template <int V>
QK_INLINE void add_single(__m256i (&acc)[V], const __m256i (&a)[V], const int32_t* w,
                          const __m256i& ones) {
  const __m256i weight = _mm256_set1_epi32(*w);
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    __m256i sum;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
            : "+x"(acc[v]), "=&x"(sum)
            : "x"(a[v]), "x"(weight), "m"(ones));
  }
}

// acc[c][v]: column c of rows 8 * v to 8 * v + 7.
template <int V>
QK_INLINE void multiply(const GroupSteps& steps, const uint8_t* rows, __m256i (&acc)[4][V]) {
  const __m256i& ones = *reinterpret_cast<const __m256i*>(kOneWords);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[c][v] = _mm256_set1_epi32(steps.init[c]);
  }
  const uint16_t* source = steps.source;
  const int32_t* w = steps.weights;
  for (int64_t left = steps.doubles; left > 0; --left, source += 2, w += 8) {
    const uint8_t *p = rows + size_t{source[0]} * (32 * V),
                  *q = rows + size_t{source[1]} * (32 * V);
    __m256i a[V], b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) a[v] = load(p + 32 * v), b[v] = load(q + 32 * v);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) add_double(acc[c], a, b, w + c, w + 4 + c, ones);
  }
  for (int64_t left = steps.singles; left > 0; --left, ++source, w += 4) {
    const uint8_t* p = rows + size_t{*source} * (32 * V);
    __m256i a[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) a[v] = load(p + 32 * v);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) add_single(acc[c], a, w + c, ones);
  }
}

QK_INLINE __m128i broadcast_quad(const uint8_t* row, uint16_t source) {
  return _mm_castps_si128(
      _mm_broadcast_ss(reinterpret_cast<const float*>(row + 4 * size_t{source})));
}

// The products of a double step with a single row: those of one quad in each lane.
QK_INLINE __m256i double_products(const uint8_t* row, const uint16_t* source, const int32_t* w,
                                  __m256i ones) {
  const __m256i first = _mm256_castsi128_si256(broadcast_quad(row, source[0]));
  const __m256i a = _mm256_inserti128_si256(first, broadcast_quad(row, source[1]), 1);
  return _mm256_madd_epi16(_mm256_maddubs_epi16(a, load(w)), ones);
}

// Weights that are read so many dwords later: groups follow each other.
constexpr int64_t kAhead = 512;

// The four columns of a single row.
QK_INLINE __m128i multiply_row(const GroupSteps& steps, const uint8_t* row) {
  const __m256i ones = load(kOneWords);
  __m256i sum = _mm256_setzero_si256(), other = sum;
  const uint16_t* source = steps.source;
  const int32_t* w = steps.weights;
  int64_t left = steps.doubles;
  for (; left > 1; left -= 2, source += 4, w += 16) {
    _mm_prefetch(reinterpret_cast<const char*>(w + kAhead), _MM_HINT_T0);
    sum = _mm256_add_epi32(sum, double_products(row, source, w, ones));
    other = _mm256_add_epi32(other, double_products(row, source + 2, w + 8, ones));
  }
  if (left > 0) {
    other = _mm256_add_epi32(other, double_products(row, source, w, ones));
    source += 2, w += 8;
  }
  sum = _mm256_add_epi32(sum, other);
  __m128i acc = _mm_load_si128(reinterpret_cast<const __m128i*>(steps.init));
  acc = _mm_add_epi32(acc, _mm256_castsi256_si128(sum));
  acc = _mm_add_epi32(acc, _mm256_extracti128_si256(sum, 1));
  for (left = steps.singles; left > 0; --left, ++source, w += 4) {
    const __m128i weights = _mm_load_si128(reinterpret_cast<const __m128i*>(w));
    const __m128i products = _mm_maddubs_epi16(broadcast_quad(row, *source), weights);
    acc = _mm_add_epi32(acc, _mm_madd_epi16(products, _mm256_castsi256_si128(ones)));
  }
  return acc;
}

QK_INLINE __m128i four_rows(const uint8_t* rows, uint16_t source) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(rows + 16 * size_t{source}));
}

// `w`: in each lane the weights of four columns.
QK_INLINE void add_four(FourVectors& acc, __m256i a, __m256i w, __m256i ones) {
  const __m256i weights[4] = {_mm256_shuffle_epi32(w, 0x00), _mm256_shuffle_epi32(w, 0x55),
                              _mm256_shuffle_epi32(w, 0xaa), _mm256_shuffle_epi32(w, 0xff)};
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m256i products = _mm256_maddubs_epi16(a, weights[c]);
    acc.at[c] = _mm256_add_epi32(acc.at[c], _mm256_madd_epi16(products, ones));
  }
}

// The sums of four rows, a vector for each column: the low lane has those of one quad of a double
// step, the high lane those of the other.
QK_INLINE FourVectors multiply_four(const GroupSteps& steps, const uint8_t* rows) {
  const __m256i ones = load(kOneWords);
  FourVectors acc;
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) acc.at[c] = _mm256_zextsi128_si256(_mm_set1_epi32(steps.init[c]));
  const uint16_t* source = steps.source;
  const int32_t* w = steps.weights;
  for (int64_t left = steps.doubles; left > 0; --left, source += 2, w += 8) {
    const __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(four_rows(rows, source[0])),
                                              four_rows(rows, source[1]), 1);
    add_four(acc, a, load(w), ones);
  }
  for (int64_t left = steps.singles; left > 0; --left, ++source, w += 4) {
    const __m128i weights = _mm_load_si128(reinterpret_cast<const __m128i*>(w));
    add_four(acc, _mm256_zextsi128_si256(four_rows(rows, *source)), _mm256_zextsi128_si256(weights),
             ones);
  }
  return acc;
}

// Four columns of eight rows to rows of 16 columns in memory.
QK_INLINE void store_sums(const FourVectors& columns, int32_t* to) {
  const FourVectors rows = transpose_dwords(columns);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm_store_si128(reinterpret_cast<__m128i*>(to + 16 * i), _mm256_castsi256_si128(rows.at[i]));
    _mm_store_si128(reinterpret_cast<__m128i*>(to + 16 * (i + 4)),
                    _mm256_extracti128_si256(rows.at[i], 1));
  }
}

// What the tiles of a panel share, read once, as a store of bytes may alias it.
struct StepPanel {
  explicit StepPanel(const IgemmTile& tile)
      : matrix(*tile.matrix),
        store(tile),
        first_group(tile.first_column / kGroupColumns),
        groups((tile.columns + kGroupColumns - 1) / kGroupColumns) {}

  PackedMatrix matrix;
  ColumnStore store;
  int64_t first_group, groups;
};

// A tile of `count` rows of bytes.
template <int V, Residual kResidual>
__attribute__((noinline)) void run_bytes(const StepPanel& panel, const uint8_t* a,
                                         const TileRows& rows, int64_t count) {
  alignas(32) uint8_t bytes[V][4][32], residual[V][4][32];
  if constexpr (kResidual != Residual::kNone) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      panel.store.load(rows.residual + 8 * v, count - 8 * v, residual[v][0]);
  }
  for (int64_t g = 0; g < panel.groups; ++g) {
    __m256i acc[4][V];
    multiply<V>(GroupSteps(panel.matrix, panel.first_group + g), a, acc);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const __m256i dwords = panel.store.dwords<kResidual>(acc[0][v], acc[1][v], acc[2][v],
                                                           acc[3][v], 4 * g, residual[v][g]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(bytes[v][g]), dwords);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) panel.store.store(bytes[v][0], rows.out + 8 * v, count - 8 * v);
}

// A tile of `count` rows of any other output.
template <int V>
__attribute__((noinline)) void run_general(const StepPanel& panel, const IgemmTile& tile,
                                           const uint8_t* a, const TileRows& rows, int64_t count) {
  alignas(32) int32_t sums[8 * V * 16];
  for (int64_t g = 0; g < panel.groups; ++g) {
    __m256i acc[4][V];
    multiply<V>(GroupSteps(panel.matrix, panel.first_group + g), a, acc);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      store_sums({{acc[0][v], acc[1][v], acc[2][v], acc[3][v]}}, sums + 128 * v + 4 * g);
    }
  }
  store_general_avx2(tile, rows, sums, count);
}

// Rows [0, count) of sums, 16 columns each.
QK_INLINE void store_rows_of_sums(const IgemmTile& tile, TileRows rows, int64_t count,
                                  const int32_t* sums) {
  const YmmStore<2> store(tile);
  for (int64_t i = 0; i < count; ++i, sums += 16, rows.advance(1)) {
    const __m256i acc[1][2] = {{load(sums), load(sums + 8)}};
    store.run<1>(tile, rows, acc);
  }
}

// A tile of `count` <= 4 rows.
__attribute__((noinline)) void run_four(const StepPanel& panel, const IgemmTile& tile,
                                        const uint8_t* a, const TileRows& rows, int64_t count) {
  alignas(32) int32_t sums[4 * 16];
  for (int64_t g = 0; g < panel.groups; ++g) {
    const FourVectors acc = multiply_four(GroupSteps(panel.matrix, panel.first_group + g), a);
    const FourVectors by_row = transpose_dwords(acc);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(by_row.at[i]),
                                        _mm256_extracti128_si256(by_row.at[i], 1));
      _mm_store_si128(reinterpret_cast<__m128i*>(sums + 16 * i + 4 * g), sum);
    }
  }
  store_rows_of_sums(tile, rows, count, sums);
}

// A single row.
__attribute__((noinline)) void run_row(const StepPanel& panel, const IgemmTile& tile,
                                       const uint8_t* a, const TileRows& rows) {
  alignas(32) int32_t sums[16];
  for (int64_t g = 0; g < panel.groups; ++g) {
    const GroupSteps steps(panel.matrix, panel.first_group + g);
    _mm_store_si128(reinterpret_cast<__m128i*>(sums + 4 * g), multiply_row(steps, a));
  }
  store_rows_of_sums(tile, rows, 1, sums);
}

template <typename Rows>
struct ByteTile {
  static constexpr Isa kIsa = Isa::kAvx2;
  using Copy = Rows;
  static int64_t max_rows(const PackedHeader& header, int64_t) {
    const int64_t held = Copy::rows_held(header);
    return held >= kMostRows ? kMostRows : held >= kVectorRows ? kVectorRows : 1;
  }
  static void tile(int64_t count, int64_t, const IgemmTile& tile) {
    const PackedHeader& header = *tile.matrix->header;
    const int64_t most = max_rows(header, 2);
    const StepPanel panel(tile);
    TileRows rows(tile);
    for (int64_t row = 0; row < count;) {
      const int64_t size = tile_rows(count - row, most);
      const int64_t taken = count - row < size ? count - row : size;
      const uint8_t* a = tile.rows[row];
      if (size == kMostRows) {
        run<2>(panel, tile, a, rows, taken);
      } else if (size == kVectorRows) {
        run<1>(panel, tile, a, rows, taken);
      } else if (size == kFourRows) {
        run_four(panel, tile, a, rows, taken);
      } else {
        run_row(panel, tile, a, rows);
      }
      rows.advance(taken);
      row += taken;
    }
  }
  template <int V>
  QK_INLINE void run(const StepPanel& panel, const IgemmTile& tile, const uint8_t* a,
                     const TileRows& rows, int64_t count) {
    const PackedHeader& header = *tile.matrix->header;
    const bool looks_up = header.epilogue.has_table;
    if (!header.packs_bytes()) {
      run_general<V>(panel, tile, a, rows, count);
    } else if (looks_up || !header.epilogue.has_residual) {
      run_bytes<V, Residual::kNone>(panel, a, rows, count);
      if (looks_up) finish_bytes_avx2(tile, rows, count);
    } else if (tile.residual_signed) {
      run_bytes<V, Residual::kS8>(panel, a, rows, count);
    } else {
      run_bytes<V, Residual::kU8>(panel, a, rows, count);
    }
  }
};

// A function for each: the stack of the larger is half a megabyte.
template <bool Flip, int64_t kBytes>
__attribute__((noinline)) void run_blocks(const IgemmBlock& block) {
  igemm_blocks<ByteTile<QuadRows<Flip, kBytes>>>(block);
}

template <bool Flip>
QK_INLINE void run(const IgemmBlock& block) {
  const PackedHeader& header = *block.args.matrix.header;
  const bool few = QuadRows<Flip, kFewBytes>::rows_held(header) >= kMostRows;
  few ? run_blocks<Flip, kFewBytes>(block) : run_blocks<Flip, kManyBytes>(block);
}

}  // namespace

void igemm_avx2_steps(const IgemmBlock& block) {
  block.args.matrix.header->input_signed ? run<true>(block) : run<false>(block);
}

}  // namespace qk
QK_TARGET_END
