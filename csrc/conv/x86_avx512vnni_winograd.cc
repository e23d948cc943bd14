// AVX512-VNNI: the three stages of winograd.h.
//
// Trick: pixels are transformed 32 channels at a time, first down, then across, by way of 36
//   vectors of scratch in L1. Sums are a tile of 6 rows (tiles of the image) x 64 columns of
//   vpdpwssd, as in gemm/x86_avx512vnni.cc, one matrix product for each of the 36 points. Outputs
//   are transformed 16 columns at a time and stored by the GEMM's epilogue.
#include <immintrin.h>

#include "csrc/base/integers.h"
#include "csrc/base/target.h"
#include "csrc/conv/winograd.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

#include "csrc/gemm/x86_driver.h"

#include "csrc/gemm/x86_avx512_epilogue.h"

#include "csrc/gemm/x86_avx512_store.h"

#include "csrc/conv/x86_winograd_transforms.h"

struct Words {
  using V = __m512i;
  QK_INLINE V add(V a, V b) { return _mm512_add_epi16(a, b); }
  QK_INLINE V sub(V a, V b) { return _mm512_sub_epi16(a, b); }
  QK_INLINE V shifted(V a, unsigned count) { return _mm512_slli_epi16(a, count); }
};

struct Sums {
  using V = __m512i;
  QK_INLINE V add(V a, V b) { return _mm512_add_epi32(a, b); }
  QK_INLINE V sub(V a, V b) { return _mm512_sub_epi32(a, b); }
  QK_INLINE V shifted(V a, unsigned count) { return _mm512_slli_epi32(a, count); }
};

// 32 channels of one tile.
template <bool Flip>
QK_INLINE void transform_window(const uint8_t* const* pixels, int64_t channel, __mmask32 mask,
                                __m512i* scratch, int16_t* to, int64_t point_stride) {
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  for (int column = 0; column < kWindow; ++column) {
    __m512i x[kWindow], v[kWindow];
#pragma GCC unroll 6
    for (int row = 0; row < kWindow; ++row) {
      __m256i bytes = _mm256_maskz_loadu_epi8(mask, pixels[row * kWindow + column] + channel);
      if (Flip) bytes = _mm256_xor_si256(bytes, flip);
      x[row] = _mm512_cvtepu8_epi16(bytes);
    }
    transform_pixels<Words>(x, v);
#pragma GCC unroll 6
    for (int row = 0; row < kWindow; ++row) scratch[row * kWindow + column] = v[row];
  }
  for (int row = 0; row < kWindow; ++row) {
    __m512i x[kWindow], v[kWindow];
#pragma GCC unroll 6
    for (int column = 0; column < kWindow; ++column) x[column] = scratch[row * kWindow + column];
    transform_pixels<Words>(x, v);
#pragma GCC unroll 6
    for (int column = 0; column < kWindow; ++column, to += point_stride) {
      _mm512_store_si512(to, v[column]);
    }
  }
}

template <bool Flip>
void transform_tiles(const WinogradBlock& b) {
  const int64_t depth = align_up(b.channels, kWinogradLanes);
  for (int64_t tile = 0; tile < b.count; ++tile) {
    for (int64_t c = 0; c < b.channels; c += kWinogradLanes) {
      const __mmask32 mask = static_cast<__mmask32>(mask64(b.channels - c));
      transform_window<Flip>(b.pixels + tile * kPoints, c, mask,
                             reinterpret_cast<__m512i*>(b.scratch),
                             b.transformed + tile * depth + c, b.point_stride);
    }
  }
}

QK_INLINE void dot(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

QK_INLINE __m512i broadcast_pair(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}

// What the rows of a panel and a point share.
struct Product {
  const int16_t* weights;
  int64_t pairs, depth, row_stride;  // row_stride: of the sums
};

// R rows at `a` with V vectors of columns.
template <int R, int V>
__attribute__((noinline)) void multiply_rows(const Product& product, const int16_t* a,
                                             int32_t* sums) {
  const int64_t depth = product.depth, pairs = product.pairs;
  const int16_t* b = product.weights;
  __m512i acc[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) acc[i][j] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < pairs; ++k, b += 32 * V) {
    __m512i bv[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) bv[j] = _mm512_load_si512(b + 32 * j);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m512i av = broadcast_pair(a + i * depth + 2 * k);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) dot(acc[i][j], av, bv[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      _mm512_store_si512(sums + i * product.row_stride + 16 * j, acc[i][j]);
    }
  }
}

template <int V>
QK_INLINE void multiply_some_rows(const Product& product, int64_t rows, const int16_t* a,
                                  int32_t* sums) {
  switch (rows) {
    case 1:
      return multiply_rows<1, V>(product, a, sums);
    case 2:
      return multiply_rows<2, V>(product, a, sums);
    case 3:
      return multiply_rows<3, V>(product, a, sums);
    case 4:
      return multiply_rows<4, V>(product, a, sums);
    case 5:
      return multiply_rows<5, V>(product, a, sums);
    case 6:
      return multiply_rows<6, V>(product, a, sums);
  }
  if constexpr (V < 4) {
    return rows == 7 ? multiply_rows<7, V>(product, a, sums)
                     : multiply_rows<8, V>(product, a, sums);
  }
}

// All points of all tiles of the block with one panel.
template <int V>
void multiply_panel(const WinogradBlock& b, const int16_t* weights) {
  const EvenTiles even = even_tiles(b.count, V == 4 ? 6 : 8);
  const int64_t depth = align_up(b.channels, kWinogradLanes), pairs = (b.channels + 1) / 2;
  for (int point = 0; point < kPoints; ++point) {
    const Product product{weights + point * pairs * 32 * V, pairs, depth, kPoints * 64};
    const int16_t* a = b.transformed + point * b.point_stride;
    int32_t* sums = b.sums + point * 64;
    for (int64_t t = 0; t < even.tiles; ++t) {
      const int64_t rows = even.rows + (t < even.larger);
      multiply_some_rows<V>(product, rows, a, sums);
      a += rows * depth;
      sums += rows * product.row_stride;
    }
  }
}

// 16 columns: from the sums of a tile to its accumulators, [pixel][64].
QK_INLINE void transform_outputs(const int32_t* sums, __m512i init, int32_t* acc) {
  const __m512i ninth = _mm512_set1_epi32(kNinth);
  __m512i t[kTile][kWindow];
#pragma GCC unroll 6
  for (int column = 0; column < kWindow; ++column) {
    __m512i m[kWindow], y[kTile];
#pragma GCC unroll 6
    for (int row = 0; row < kWindow; ++row) {
      m[row] = _mm512_load_si512(sums + (row * kWindow + column) * 64);
    }
    transform_sums<Sums>(m, y);
#pragma GCC unroll 4
    for (int row = 0; row < kTile; ++row) t[row][column] = y[row];
  }
#pragma GCC unroll 4
  for (int row = 0; row < kTile; ++row) {
    __m512i y[kTile];
    transform_sums<Sums>(t[row], y);
#pragma GCC unroll 4
    for (int column = 0; column < kTile; ++column) {
      const __m512i exact = _mm512_srai_epi32(_mm512_mullo_epi32(y[column], ninth), 6);
      _mm512_store_si512(acc + (row * kTile + column) * 64, _mm512_add_epi32(exact, init));
    }
  }
}

// Part `index` of `count` of the weights that the next call reads, on their way to L2.
QK_INLINE void fetch(const NextWeights& next, int64_t index, int64_t count) {
  const int64_t lines = next.bytes / 64;
  for (int64_t line = lines * index / count; line < lines * (index + 1) / count; ++line) {
    _mm_prefetch(next.data + 64 * line, _MM_HINT_T1);
  }
}

// The outputs of all tiles of the block in one panel. `next`: fetched meanwhile.
void store_panel(const WinogradBlock& b, const PackedMatrix& matrix, int64_t first_column,
                 int64_t columns, const NextWeights& next) {
  alignas(64) int32_t acc[kTile * kTile * 64];
  const int64_t vectors = (columns + 15) / 16;
  const int64_t first_byte = first_column * output_bytes(matrix.header->epilogue.output);
  const StoreRows store = select_store(*matrix.header, vectors, b.residual_signed);
  uint8_t* out[kTile * kTile];
  const uint8_t* residual[kTile * kTile] = {};
  IgemmTile rows{};
  rows.matrix = &matrix;
  rows.first_column = first_column;
  rows.columns = columns;
  rows.out = out;
  rows.residual = residual;
  rows.residual_signed = b.residual_signed;
  rows.lookup = b.lookup;
  for (int64_t t = 0; t < b.count; ++t) {
    const WinogradTile& tile = b.tiles[t];
    fetch(next, t, b.count);
    for (int64_t c = 0; c < columns; c += 16) {
      transform_outputs(b.sums + t * kPoints * 64 + c,
                        _mm512_load_si512(matrix.init + first_column + c), acc + c);
    }
    for (int64_t row = 0; row < tile.height; ++row) {
      for (int64_t column = 0; column < tile.width; ++column) {
        const int64_t i = row * kTile + column;
        out[i] = tile.out + first_byte + row * b.out_row_stride + column * b.out_pixel_stride;
        if (tile.residual == nullptr) continue;
        residual[i] = tile.residual + first_column + row * b.residual_row_stride +
                      column * b.residual_pixel_stride;
      }
    }
    if (tile.width == kTile) {
      store(rows, acc, 0, tile.height * kTile);
    } else {
      for (int64_t row = 0; row < tile.height; ++row) {
        store(rows, acc, row * kTile, row * kTile + tile.width);
      }
    }
  }
}

}  // namespace

void winograd_avx512vnni(const WinogradBlock& b) {
  PackedMatrix matrix = b.matrix;
  matrix.weight_zero_point = nullptr;  // the weights have it already
  const PackedHeader& header = *matrix.header;
  header.input_signed ? transform_tiles<true>(b) : transform_tiles<false>(b);
  const int16_t* weights = b.weights + b.panel_begin * kPoints * ((b.channels + 1) / 2) * 128;
  for (int64_t panel = b.panel_begin; panel < b.panel_end; ++panel) {
    const int64_t first = panel * 64, columns = header.n - first < 64 ? header.n - first : 64;
    switch ((columns + 15) / 16) {
      case 1:
        multiply_panel<1>(b, weights);
        break;
      case 2:
        multiply_panel<2>(b, weights);
        break;
      case 3:
        multiply_panel<3>(b, weights);
        break;
      default:
        multiply_panel<4>(b, weights);
    }
    const bool last = panel + 1 == b.panel_end;
    store_panel(b, matrix, first, columns, last ? b.next : NextWeights{});
    weights += kPoints * ((b.channels + 1) / 2) * 128;
  }
}

}  // namespace qk
QK_TARGET_END
