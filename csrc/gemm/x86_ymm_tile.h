// What the 16-column tiles of AVX2 and AVX-VNNI share: the stores and the choice of the tile's
// size. Include it inside a target region, inside the anonymous namespace of a kernel file, after
// x86_driver.h and x86_avx2_epilogue.h.
//
// A Multiply has
//   template <int R, int V>
//   static void run(const YmmPanel&, const uint8_t* const* rows, __m256i (&acc)[R][V]):
//     acc[i][j] = init[j] + sum over tap, k, and
//   kMaxRows, kMaxNarrowRows: of a tile of two vectors and of one.
// Rows, the driver's Copy, has  static int64_t rows_held(const PackedHeader&): the most it takes.

QK_INLINE __m256i broadcast4(const uint8_t* p) {
  int32_t bytes;
  __builtin_memcpy(&bytes, p, 4);
  return _mm256_set1_epi32(bytes);
}

QK_INLINE void store_high(uint8_t* out, __m128i v) {
  const int64_t bytes = _mm_extract_epi64(v, 1);
  __builtin_memcpy(out, &bytes, 8);
}

// Bytes [0, n) of a vector of bytes to out[0], the next n of its next 8 * V bytes to out[1], ...
template <int V>
QK_INLINE void store_rows(uint8_t* const* out, int64_t rows, int64_t n, __m256i bytes) {
  constexpr int64_t kPart = 8 * V;
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  if (n < kPart) {
    alignas(32) uint8_t memory[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(memory), bytes);
    for (int64_t i = 0; i < rows; ++i) {
      __builtin_memcpy(out[i], memory + kPart * i, static_cast<size_t>(n));
    }
  } else if constexpr (V == 2) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[0]), low);
    if (rows > 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(out[1]), high);
  } else {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out[0]), low);
    if (rows > 1) store_high(out[1], low);
    if (rows > 2) _mm_storel_epi64(reinterpret_cast<__m128i*>(out[2]), high);
    if (rows > 3) store_high(out[3], high);
  }
}

// Where the rows of a tile are stored, on from tile to tile.
struct TileRows {
  explicit TileRows(const IgemmTile& tile)
      : out(tile.out), residual(tile.residual), row_sums(tile.row_sums) {}

  inline __attribute__((always_inline)) void advance(int64_t count) {
    out += count;
    residual += count;
    row_sums += count;
  }

  uint8_t* const* out;
  const uint8_t* const* residual;
  const uint32_t* row_sums;
};

// Table and residual, in place on the bytes just written (still in L1).
__attribute__((noinline)) void finish_bytes_avx2(const IgemmTile& tile, TileRows rows,
                                                 int64_t count) {
  const Epilogue& e = tile.matrix->header->epilogue;
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* q = rows.out[i];
    if (e.has_table) tile.lookup({q, q, e.table, 1, tile.columns, 0, 0});
    if (e.has_residual) {
      residual_add_avx2(e, q, rows.residual[i], tile.residual_signed, tile.columns);
    }
  }
}

// Every output: from the accumulators in memory, [count][16].
__attribute__((noinline)) void store_general_avx2(const IgemmTile& tile, TileRows rows,
                                                  const int32_t* acc, int64_t count) {
  const PackedMatrix& m = *tile.matrix;
  const Epilogue& e = m.header->epilogue;
  const int64_t element = output_bytes(e.output);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < tile.columns; c += 8) {
      const int64_t column = tile.first_column + c;
      __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(acc + 16 * i + c));
      if (m.weight_zero_point != nullptr) {
        const __m256i zw =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(m.weight_zero_point + column));
        const __m256i row = _mm256_set1_epi32(static_cast<int32_t>(rows.row_sums[i]));
        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zw, row));
      }
      store_x8(e, sum, _mm256_load_ps(m.addend + column), _mm256_load_ps(m.mult + column),
               rows.out[i] + c * element, tile.columns - c);
    }
  }
  finish_bytes_avx2(tile, rows, count);
}

// What the tiles of a panel share: read once, as a store of bytes may alias it.
struct YmmPanel {
  explicit YmmPanel(const IgemmTile& tile)
      : weights(tile.panel),
        init(tile.matrix->init + tile.first_column),
        taps(tile.matrix->header->taps),
        depth(tile.matrix->header->depth) {}

  const int8_t* weights;
  const int32_t* init;
  int64_t taps, depth;
};

// How the sums of a panel become outputs, read once too.
template <int V>
struct YmmStore {
  explicit YmmStore(const IgemmTile& tile)
      : pack(tile.matrix->header->epilogue),
        pack_sum(tile.matrix->header->epilogue, tile.matrix->header->epilogue.residual),
        add(tile.matrix->header->epilogue),
        addend(tile.matrix->addend + tile.first_column),
        mult(tile.matrix->mult + tile.first_column),
        columns(tile.columns),
        packs(tile.matrix->header->packs_bytes()),
        looks_up(tile.matrix->header->epilogue.has_table != 0),
        adds(tile.matrix->header->epilogue.has_residual != 0) {}

  // R rows, from registers, or by way of memory what is not just bytes.
  template <int R>
  inline __attribute__((always_inline)) void run(const IgemmTile& tile, const TileRows& rows,
                                                 const __m256i (&acc)[R][V]) const {
    if (!packs) {
      alignas(32) int32_t memory[R][16];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(&memory[i][8 * j]), acc[i][j]);
        }
      }
      store_general_avx2(tile, rows, memory[0], R);
    } else if (looks_up || !adds) {
      bytes<R, Residual::kNone>(pack, rows, acc);
      if (looks_up) finish_bytes_avx2(tile, rows, R);
    } else if (tile.residual_signed) {
      bytes<R, Residual::kS8>(pack_sum, rows, acc);
    } else {
      bytes<R, Residual::kU8>(pack_sum, rows, acc);
    }
  }

  template <int R, Residual kResidual>
  inline __attribute__((always_inline)) void bytes(const PackX32& packing, const TileRows& rows,
                                                   const __m256i (&acc)[R][V]) const {
    constexpr int kGroup = 4 / V;
#pragma GCC unroll 8
    for (int i = 0; i < R; i += kGroup) {
      __m256i q[4];
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const int row = i + part / V, c = part % V;
        q[part] = row < R ? rounded<kResidual>(acc[row < R ? row : 0][c], rows, row, c) : q[0];
      }
      store_rows<V>(rows.out + i, R - i < kGroup ? R - i : kGroup, columns,
                    packing.run(q[0], q[1], q[2], q[3]));
    }
  }

  // Vector c of a row, RNE of the value over the output scale.
  template <Residual kResidual>
  inline __attribute__((always_inline)) __m256i rounded(__m256i acc, const TileRows& rows, int row,
                                                        int c) const {
    const __m256 v = scale_x8(acc, _mm256_load_ps(addend + 8 * c), _mm256_load_ps(mult + 8 * c));
    if constexpr (kResidual == Residual::kNone) return _mm256_cvtps_epi32(v);
    return add.template run<kResidual == Residual::kS8>(v, rows.residual[row] + 8 * c,
                                                        columns - 8 * c);
  }

  PackX32 pack, pack_sum;
  FusedAddX8 add;
  const float *addend, *mult;
  int64_t columns;
  bool packs, looks_up, adds;
};

// `tiles` tiles of R rows, one below the other.
template <typename Multiply, int R, int V>
__attribute__((noinline)) void run_tiles(IgemmTile& tile, int64_t tiles) {
  const YmmPanel panel(tile);
  const YmmStore<V> store(tile);
  const uint8_t* const* a = tile.rows;
  const int64_t pitch = R * tile.row_pitch;
  TileRows rows(tile);
  for (int64_t left = tiles; left > 0; --left, a += pitch) {
    __m256i acc[R][V];
    Multiply::template run<R, V>(panel, a, acc);
    store.template run<R>(tile, rows, acc);
    rows.advance(R);
  }
  tile.advance(R * tiles);
}

template <typename Multiply, typename Rows, Isa kLayout>
struct YmmTile {
  static constexpr Isa kIsa = kLayout;
  using Copy = Rows;
  static int64_t max_rows(const PackedHeader& header, int64_t vectors) {
    const int64_t most = vectors == 2 ? Multiply::kMaxRows : Multiply::kMaxNarrowRows;
    const int64_t held = Copy::rows_held(header);
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
    }
    constexpr int64_t kMost = V == 2 ? Multiply::kMaxRows : Multiply::kMaxNarrowRows;
    if constexpr (kMost >= 6) {
      if (rows == 5) return run_tiles<Multiply, 5, V>(tile, tiles);
      if (rows == 6) return run_tiles<Multiply, 6, V>(tile, tiles);
    }
    if constexpr (kMost >= 8) {
      if (rows == 7) return run_tiles<Multiply, 7, V>(tile, tiles);
      if (rows == 8) return run_tiles<Multiply, 8, V>(tile, tiles);
    }
  }
};
