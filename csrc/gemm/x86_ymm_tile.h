// What the 16-column tiles of AVX2 and AVX-VNNI share: the stores and the choice of the tile's
// size. Include it inside a target region, inside the anonymous namespace of a kernel file, after
// x86_driver.h and x86_avx2_epilogue.h.
//
// A Multiply has  template <int R, int V> static void run(const IgemmTile&, __m256i (&acc)[R][V]):
//   acc[i][j] = init[j] + sum over tap, k,  a type Copy as the driver's, and
//   static int64_t rows_held(const PackedHeader&), the most rows that Copy takes.

// The 8-bit store without weight zero points, straight from the accumulators.
template <int R, int V>
QK_INLINE void store_bytes(const IgemmTile& tile, const __m256i (&acc)[R][V]) {
  const Requantize16 constants = requantize16_constants(tile.matrix->header->epilogue);
  __m256 addend[V], mult[V];
#pragma GCC unroll 2
  for (int j = 0; j < V; ++j) {
    addend[j] = _mm256_load_ps(tile.matrix->addend + tile.first_column + 8 * j);
    mult[j] = _mm256_load_ps(tile.matrix->mult + tile.first_column + 8 * j);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    const __m256i q0 = scale_x8(acc[i][0], addend[0], mult[0]);
    const __m256i q1 =
        V == 2 ? scale_x8(acc[i][V - 1], addend[V - 1], mult[V - 1]) : _mm256_setzero_si256();
    const __m128i bytes = pack_x16(constants, q0, q1);
    if (tile.columns == 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(tile.out[i]), bytes);
    } else {
      store_bytes_upto8(tile.out[i], bytes, tile.columns);
      if (tile.columns > 8) {
        store_bytes_upto8(tile.out[i] + 8, _mm_unpackhi_epi64(bytes, bytes), tile.columns - 8);
      }
    }
  }
}

// Every other output: from the accumulators in memory, [rows][16].
__attribute__((noinline)) void store_general_avx2(const IgemmTile& tile, const int32_t* acc,
                                                  int64_t rows) {
  const PackedMatrix& m = *tile.matrix;
  const Epilogue& e = m.header->epilogue;
  const int64_t element = output_bytes(e.output);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < tile.columns; c += 8) {
      const int64_t column = tile.first_column + c;
      __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(acc + 16 * i + c));
      if (m.weight_zero_point != nullptr) {
        const __m256i zw =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(m.weight_zero_point + column));
        const __m256i row = _mm256_set1_epi32(static_cast<int32_t>(tile.row_sums[i]));
        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zw, row));
      }
      store_x8(e, sum, _mm256_load_ps(m.addend + column), _mm256_load_ps(m.mult + column),
               tile.out[i] + c * element, tile.columns - c);
    }
  }
}

// Table and residual, in place on the bytes just written (still in L1).
__attribute__((noinline)) void finish_bytes_avx2(const IgemmTile& tile, int64_t rows) {
  const Epilogue& e = tile.matrix->header->epilogue;
  for (int64_t i = 0; i < rows; ++i) {
    if (e.has_table) tile.lookup({tile.out[i], tile.out[i], e.table, 1, tile.columns, 0, 0});
    if (e.has_residual) {
      residual_add_avx2(e, tile.out[i], tile.residual[i], tile.residual_signed, tile.columns);
    }
  }
}

template <int R, int V>
QK_INLINE void store_tile(const IgemmTile& tile, const __m256i (&acc)[R][V]) {
  const PackedHeader& header = *tile.matrix->header;
  if (header.epilogue.is_8bit() && !header.wide && !header.has_weight_zero_point) {
    store_bytes<R, V>(tile, acc);
  } else {
    alignas(32) int32_t memory[R][16];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(&memory[i][8 * j]), acc[i][j]);
      }
    }
    store_general_avx2(tile, memory[0], R);
  }
  if (header.epilogue.has_table || header.epilogue.has_residual) finish_bytes_avx2(tile, R);
}

// `tiles` tiles of R rows, one below the other.
template <typename Multiply, int R, int V>
__attribute__((noinline)) void run_tiles(IgemmTile& tile, int64_t tiles) {
  for (; tiles > 0; --tiles) {
    __m256i acc[R][V];
    Multiply::template run<R, V>(tile, acc);
    store_tile<R, V>(tile, acc);
    tile.advance(R);
  }
}

template <typename Multiply, Isa kLayout>
struct YmmTile {
  static constexpr Isa kIsa = kLayout;
  using Copy = typename Multiply::Copy;
  static int64_t max_rows(const PackedHeader& header, int64_t vectors) {
    const int64_t most = vectors == 2 ? 6 : 8, held = Multiply::rows_held(header);
    return held < most ? held : most;
  }
  static void tile(int64_t rows, int64_t vectors, IgemmTile tile) {
    const EvenTiles even = even_tiles(rows, max_rows(*tile.matrix->header, vectors));
    if (even.larger > 0) run(even.rows + 1, even.larger, vectors, tile);
    run(even.rows, even.tiles - even.larger, vectors, tile);
  }
  static void run(int64_t rows, int64_t tiles, int64_t vectors, IgemmTile& tile) {
    return vectors == 2 ? run_rows<2>(rows, tiles, tile) : run_rows<1>(rows, tiles, tile);
  }
  template <int V>
  QK_INLINE void run_rows(int64_t rows, int64_t tiles, IgemmTile& tile) {
    switch (rows) {
      case 1:
        return run_tiles<Multiply, 1, V>(tile, tiles);
      case 2:
        return run_tiles<Multiply, 2, V>(tile, tiles);
      case 3:
        return run_tiles<Multiply, 3, V>(tile, tiles);
      case 4:
        return run_tiles<Multiply, 4, V>(tile, tiles);
      case 5:
        return run_tiles<Multiply, 5, V>(tile, tiles);
      case 6:
        return run_tiles<Multiply, 6, V>(tile, tiles);
    }
    if constexpr (V == 1) {
      return rows == 7 ? run_tiles<Multiply, 7, V>(tile, tiles)
                       : run_tiles<Multiply, 8, V>(tile, tiles);
    }
  }
};
