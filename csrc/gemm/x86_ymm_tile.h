// The 16-column tiles of AVX-VNNI and of AVX2's pairs: the choice of their size. Include it inside
// a target region, inside the anonymous namespace of a kernel file, after x86_ymm_store.h.
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
