// Tiles that are added to a residual while the products of the next tile run. Include it in
// x86_avx512vnni.cc, after Panel, Sums, Quads, Tails, Packing and
// store_parts().
//
// Trick: the sums of a finished tile go to L1 as they are. Between the steps of K of the next tile
//   a group of their rows at a time is scaled, added to the residual, packed and stored. Products
//   and outputs use different pipes, but out-of-order execution does not bring them together: the
//   outputs of a 6 x 64 tile are more instructions than a core looks ahead. A tile has 16
//   accumulators here, so that the outputs find registers beside them.
// Memory: the sums are [rows][16 * V] int32 on the caller's stack. Numbers: as epilogue.h.

// So many accumulators cover the latency of a dot product and leave registers for the outputs. A
// panel of one vector makes do with fewer.
constexpr int kLeastPipelined = 10, kMostPipelined = 16;
constexpr bool fits_pipeline(int rows, int vectors) {
  const int sums = rows * vectors;
  return (sums >= kLeastPipelined || (vectors == 1 && rows >= 7)) && sums <= kMostPipelined;
}
constexpr int64_t pipelined_rows(int64_t vectors) {
  return vectors == 4 ? 4 : vectors == 3 ? 5 : 8;
}

// An addition makes the outputs three times as long; without one, as with many products, writing
// the sums to L1 costs as much as it saves.
QK_INLINE bool pays_to_pipeline(const PackedHeader& header) {
  const int64_t quads = header.taps * ((header.depth + 3) / 4);
  return header.epilogue.has_residual && header.stores_plain_bytes() && quads >= 4 && quads <= 160;
}

// The rows of a tile that are not stored yet.
struct Pending {
  const int32_t* sums;
  uint8_t* const* out;
  const uint8_t* const* residual;
};

// Rows [row, row + rows_in_group(V)) of R.
template <int R, int V, bool ResidualSigned>
QK_INLINE void store_group(const Panel& panel, const Packing& packing, const FusedAddX16& add,
                           const Pending& pending, int row) {
  constexpr int kRows = rows_in_group(V);
  const int rows = R - row < kRows ? R - row : kRows;
  __m512i q[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const int below = j / V, vector = j % V;
    if (below >= kRows || (R % kRows != 0 && below >= rows)) {
      q[j] = _mm512_setzero_si512();
      continue;
    }
    const __m512i sum = _mm512_load_si512(pending.sums + 16 * (V * (row + below) + vector));
    const __m512 addend = _mm512_load_ps(panel.addend + 16 * vector);
    const __m512 mult = _mm512_load_ps(panel.mult + 16 * vector);
    const __m512 v = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(sum), addend), mult);
    const __mmask16 mask = mask16(panel.columns - 16 * vector);
    q[j] = add.run<ResidualSigned>(
        v, _mm_maskz_loadu_epi8(mask, pending.residual[row + below] + 16 * vector));
  }
  store_parts<kRows>(pending.out + row, rows, panel.columns, packing.run(q[0], q[1], q[2], q[3]));
}

// Adds the products of quads [begin, end) of a tap; the panel's weights follow one another.
template <int R, int V, bool Flip, bool Half>
QK_INLINE void multiply_quads(const uint8_t* const (&p)[R], int64_t begin, int64_t end,
                              int64_t ahead, const int8_t*& weights, Sums<R, V, Half>& acc) {
  const int8_t* b = weights;
  int64_t k = begin;
  do {
    _mm_prefetch(b + ahead, _MM_HINT_T1);
    acc.template add_quad<Flip>(b, Quads<R>{p, 4 * k});
    b += 64 * V;
  } while (++k < end);
  weights = b;
}

// `tiles` tiles of R rows, one below the other; `sums` is room for one of them.
template <int R, int V, bool Flip, bool Half, bool ResidualSigned>
__attribute__((noinline)) void run_pipeline_avx512(IgemmTile& tile, int64_t tiles, int32_t* sums) {
  constexpr int kRows = rows_in_group(V), kGroups = (R + kRows - 1) / kRows;
  const Panel panel(tile);
  const Epilogue& e = tile.matrix->header->epilogue;
  const Packing packing(e, e.residual);
  const FusedAddX16 add(e);
  const int64_t taps = panel.taps, quads = panel.quads;
  // A group is stored behind so many quads.
  const int64_t share = taps * quads / kGroups;
  const int64_t chunk = share >= quads ? quads : share < 1 ? 1 : share;
  Pending pending{sums, tile.out, tile.residual};
  Rows rows(tile);
  int stored = R;  // rows of the pending tile
  for (int64_t left = tiles; left > 0; --left) {
    Sums<R, V, Half> acc;
    acc.start(panel.init);
    const int8_t* b = panel.weights;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* p[R];
      rows.find(tap, p);
      for (int64_t k = 0; k < quads;) {
        const int64_t end = quads - k < chunk ? quads : k + chunk;
        multiply_quads<R, V, Flip, Half>(p, k, end, tile.ahead, b, acc);
        k = end;
        if (stored < R) {
          store_group<R, V, ResidualSigned>(panel, packing, add, pending, stored);
          stored += kRows;
        }
      }
      if (panel.tail != 0) {
        acc.template add_quad<Flip>(b, Tails<R>{p, panel});
        b += 64 * V;
      }
    }
    for (; stored < R; stored += kRows)
      store_group<R, V, ResidualSigned>(panel, packing, add, pending, stored);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) _mm512_store_si512(sums + 16 * (V * i + j), acc.vector(i, j));
    }
    pending.out = tile.out;
    pending.residual = tile.residual;
    stored = 0;
    rows.advance(R);
    tile.advance(R);
    tile.fetch_next_lines();
  }
  for (; stored < R; stored += kRows)
    store_group<R, V, ResidualSigned>(panel, packing, add, pending, stored);
}

template <int R, int V, bool Flip, bool Half>
QK_INLINE void run_pipeline(IgemmTile& tile, int64_t tiles) {
  alignas(64) int32_t sums[16 * R * V];
  if (tile.residual_signed) {
    run_pipeline_avx512<R, V, Flip, Half, true>(tile, tiles, sums);
  } else {
    run_pipeline_avx512<R, V, Flip, Half, false>(tile, tiles, sums);
  }
}
