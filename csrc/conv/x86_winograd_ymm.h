// The three stages of winograd.h for AVX2 and AVX-VNNI. Include it inside a target region, inside
// the anonymous namespace of a kernel file, after x86_driver.h, x86_avx2_epilogue.h,
// x86_ymm_store.h and x86_winograd_transforms.h.
//
// A Dot has  static void run(__m256i& acc, __m256i a, __m256i b):  acc[i] += the products of pair i
//   of int16, modulo 2^32.
// Trick: as x86_avx512vnni_winograd.cc with half the width and half the registers: 16 channels of
//   pixels, a tile of 6 rows x 16 columns of sums, 8 columns of outputs at a time.

constexpr int64_t kColumns = 16;  // of a panel

struct Words {
  using V = __m256i;
  QK_INLINE V add(V a, V b) { return _mm256_add_epi16(a, b); }
  QK_INLINE V sub(V a, V b) { return _mm256_sub_epi16(a, b); }
  QK_INLINE V shifted(V a, int count) { return _mm256_slli_epi16(a, count); }
};

struct Sums {
  using V = __m256i;
  QK_INLINE V add(V a, V b) { return _mm256_add_epi32(a, b); }
  QK_INLINE V sub(V a, V b) { return _mm256_sub_epi32(a, b); }
  QK_INLINE V shifted(V a, int count) { return _mm256_slli_epi32(a, count); }
};

// n <= 16 bytes as int16.
template <bool Flip>
QK_INLINE __m256i load_pixel(const uint8_t* p, int64_t n) {
  __m128i bytes;
  if (n == 16) {
    bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  } else {
    const __m128i high = n > 8 ? load_bytes_upto8(p + 8, n - 8) : _mm_setzero_si128();
    bytes = _mm_unpacklo_epi64(load_bytes_upto8(p, n < 8 ? n : 8), high);
  }
  if (Flip) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
  return _mm256_cvtepu8_epi16(bytes);
}

// Up to 16 channels of one tile.
template <bool Flip>
QK_INLINE void transform_window(const uint8_t* const* pixels, int64_t channel, int64_t n,
                                __m256i* scratch, int16_t* to, int64_t point_stride) {
  for (int column = 0; column < kWindow; ++column) {
    __m256i x[kWindow], v[kWindow];
#pragma GCC unroll 6
    for (int row = 0; row < kWindow; ++row) {
      x[row] = load_pixel<Flip>(pixels[row * kWindow + column] + channel, n);
    }
    transform_pixels<Words>(x, v);
#pragma GCC unroll 6
    for (int row = 0; row < kWindow; ++row) scratch[row * kWindow + column] = v[row];
  }
  for (int row = 0; row < kWindow; ++row) {
    __m256i x[kWindow], v[kWindow];
#pragma GCC unroll 6
    for (int column = 0; column < kWindow; ++column) x[column] = scratch[row * kWindow + column];
    transform_pixels<Words>(x, v);
#pragma GCC unroll 6
    for (int column = 0; column < kWindow; ++column, to += point_stride) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), v[column]);
    }
  }
}

template <bool Flip>
void transform_tiles(const WinogradBlock& b) {
  const int64_t depth = align_up(b.channels, kWinogradLanes);
  auto* scratch = reinterpret_cast<__m256i*>(b.scratch);
  for (int64_t tile = 0; tile < b.count; ++tile) {
    const uint8_t* const* pixels = b.pixels + tile * kPoints;
    int16_t* to = b.transformed + tile * depth;
    int64_t c = 0;
    for (; c + 16 <= b.channels; c += 16) {
      transform_window<Flip>(pixels, c, 16, scratch, to + c, b.point_stride);
    }
    if (c < b.channels) {
      transform_window<Flip>(pixels, c, b.channels - c, scratch, to + c, b.point_stride);
    }
  }
}

QK_INLINE __m256i broadcast_pair(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm256_set1_epi32(pair);
}

// R rows at `a`, `depth` apart, with V vectors of columns. `ahead`: from a weight to one that is
// needed soon, or 0.
template <typename Dot, int R, int V>
__attribute__((noinline)) void multiply_rows(const int16_t* b, int64_t pairs, const int16_t* a,
                                             int64_t depth, int32_t* sums, int64_t ahead) {
  __m256i acc[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) acc[i][j] = _mm256_setzero_si256();
  }
  for (int64_t k = 0; k < pairs; ++k, b += 16 * V) {
    _mm_prefetch(b + ahead, _MM_HINT_T0);
    __m256i bv[V];
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      bv[j] = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + 16 * j));
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m256i av = broadcast_pair(a + i * depth + 2 * k);
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) Dot::run(acc[i][j], av, bv[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums + i * kPoints * kColumns + 8 * j),
                         acc[i][j]);
    }
  }
}

template <typename Dot, int V>
QK_INLINE void multiply_some_rows(int64_t rows, const int16_t* b, int64_t pairs, const int16_t* a,
                                  int64_t depth, int32_t* sums, int64_t ahead) {
  switch (rows) {
    case 1:
      return multiply_rows<Dot, 1, V>(b, pairs, a, depth, sums, ahead);
    case 2:
      return multiply_rows<Dot, 2, V>(b, pairs, a, depth, sums, ahead);
    case 3:
      return multiply_rows<Dot, 3, V>(b, pairs, a, depth, sums, ahead);
    case 4:
      return multiply_rows<Dot, 4, V>(b, pairs, a, depth, sums, ahead);
    case 5:
      return multiply_rows<Dot, 5, V>(b, pairs, a, depth, sums, ahead);
    default:
      return multiply_rows<Dot, 6, V>(b, pairs, a, depth, sums, ahead);
  }
}

// All points of all tiles of the block with one panel.
template <typename Dot, int V>
void multiply_panel(const WinogradBlock& b, const int16_t* weights) {
  const EvenTiles even = even_tiles(b.count, 6);
  const int64_t depth = align_up(b.channels, kWinogradLanes), pairs = (b.channels + 1) / 2;
  const int64_t size = pairs * 16 * V;
  for (int point = 0; point < kPoints; ++point, weights += size) {
    const int16_t* a = b.transformed + point * b.point_stride;
    int32_t* sums = b.sums + point * kColumns;
    for (int64_t t = 0; t < even.tiles; ++t) {
      const int64_t rows = even.rows + (t < even.larger);
      multiply_some_rows<Dot, V>(rows, weights, pairs, a, depth, sums, t == 0 ? size : 0);
      a += rows * depth;
      sums += rows * kPoints * kColumns;
    }
  }
}

// 8 columns: from the sums of a tile to its accumulators, [pixel][16].
QK_INLINE void transform_outputs(const int32_t* sums, __m256i init, int32_t* acc) {
  const __m256i ninth = _mm256_set1_epi32(kNinth);
  __m256i t[kTile][kWindow];
#pragma GCC unroll 6
  for (int column = 0; column < kWindow; ++column) {
    __m256i m[kWindow], y[kTile];
#pragma GCC unroll 6
    for (int row = 0; row < kWindow; ++row) {
      m[row] = _mm256_load_si256(
          reinterpret_cast<const __m256i*>(sums + (row * kWindow + column) * kColumns));
    }
    transform_sums<Sums>(m, y);
#pragma GCC unroll 4
    for (int row = 0; row < kTile; ++row) t[row][column] = y[row];
  }
#pragma GCC unroll 4
  for (int row = 0; row < kTile; ++row) {
    __m256i y[kTile];
    transform_sums<Sums>(t[row], y);
#pragma GCC unroll 4
    for (int column = 0; column < kTile; ++column) {
      const __m256i exact = _mm256_srai_epi32(_mm256_mullo_epi32(y[column], ninth), 6);
      _mm256_store_si256(reinterpret_cast<__m256i*>(acc + (row * kTile + column) * kColumns),
                         _mm256_add_epi32(exact, init));
    }
  }
}

// R accumulators, from memory to the output.
template <int R, int V>
QK_INLINE void store_pixels(const YmmStore<V>& store, const IgemmTile& rows, const int32_t* from) {
  __m256i acc[R][V];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      acc[i][j] = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i * kColumns + 8 * j));
    }
  }
  store.template run<R>(rows, TileRows(rows), acc);
}

// The outputs of all tiles of the block in one panel.
template <int V>
void store_panel(const WinogradBlock& b, const PackedMatrix& matrix, int64_t first_column,
                 int64_t columns) {
  alignas(64) int32_t acc[kTile * kTile * kColumns];
  const int64_t first_byte = first_column * output_bytes(matrix.header->epilogue.output);
  uint8_t* out[kTile];
  const uint8_t* residual[kTile] = {};
  IgemmTile rows{};
  rows.matrix = &matrix;
  rows.first_column = first_column;
  rows.columns = columns;
  rows.out = out;
  rows.residual = residual;
  rows.residual_signed = b.residual_signed;
  rows.lookup = b.lookup;
  const YmmStore<V> store(rows);
  for (int64_t t = 0; t < b.count; ++t) {
    const WinogradTile& tile = b.tiles[t];
    for (int64_t c = 0; c < 8 * V; c += 8) {
      const auto* init = reinterpret_cast<const __m256i*>(matrix.init + first_column + c);
      transform_outputs(b.sums + t * kPoints * kColumns + c, _mm256_load_si256(init), acc + c);
    }
    for (int64_t row = 0; row < tile.height; ++row) {
      uint8_t* to = tile.out + first_byte + row * b.out_row_stride;
      const int64_t from = first_column + row * b.residual_row_stride;
      const int32_t* pixel = acc + row * kTile * kColumns;
      const auto find = [&](int i, int64_t column) {
        out[i] = to + column * b.out_pixel_stride;
        if (tile.residual == nullptr) return;
        residual[i] = tile.residual + from + column * b.residual_pixel_stride;
      };
      if (tile.width == kTile) {
        for (int i = 0; i < kTile; ++i) find(i, i);
        store_pixels<kTile, V>(store, rows, pixel);
      } else {
        for (int64_t column = 0; column < tile.width; ++column) {
          find(0, column);
          store_pixels<1, V>(store, rows, pixel + column * kColumns);
        }
      }
    }
  }
}

template <typename Dot, int V>
void run_panel(const WinogradBlock& b, const PackedMatrix& matrix, const int16_t* weights,
               int64_t first_column, int64_t columns) {
  multiply_panel<Dot, V>(b, weights);
  store_panel<V>(b, matrix, first_column, columns);
}

template <typename Dot>
QK_INLINE void run_winograd(const WinogradBlock& b) {
  PackedMatrix matrix = b.matrix;
  matrix.weight_zero_point = nullptr;  // the weights have it already
  const PackedHeader& header = *matrix.header;
  header.input_signed ? transform_tiles<true>(b) : transform_tiles<false>(b);
  const int64_t panel_size = kPoints * ((b.channels + 1) / 2) * 2 * kColumns;
  for (int64_t panel = b.panel_begin; panel < b.panel_end; ++panel) {
    const int64_t first = panel * kColumns, left = header.n - first;
    const int16_t* weights = b.weights + panel * panel_size;
    if (left > 8) {
      run_panel<Dot, 2>(b, matrix, weights, first, left < kColumns ? left : kColumns);
    } else {
      run_panel<Dot, 1>(b, matrix, weights, first, left);
    }
  }
}
