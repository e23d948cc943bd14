// AVX512-VNNI: a tile of up to 6 rows x 64 columns (8 x 48, 32, 16 in a narrow last panel). Bytes
// from short rows, with or without a residual, take the tiles of x86_avx512_interleaved.h where a
// panel is as wide as its vectors, and those of x86_avx512_pipeline.h where it is not.
//
// Trick: one vpdpbusd takes four bytes of A (broadcast) and 16 columns of a packed panel. 24
//   accumulators, 4 vectors of B and one of A fill 29 registers; rows come from pointers, so
//   strided and indirect sources share the loop. Small tiles split K over several sets of
//   accumulators until at least ten sums are in flight, which covers the latency of vpdpbusd. The
//   dot product is one instruction of inline assembly: written as an intrinsic, gcc 12 spills every
//   accumulator.
#include <immintrin.h>

#include <cstddef>

#include "csrc/base/target.h"
#include "csrc/gemm/igemm.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

#include "csrc/gemm/x86_driver.h"

#include "csrc/gemm/x86_avx512_epilogue.h"

#include "csrc/gemm/x86_avx512_store.h"

QK_INLINE void dot(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

QK_INLINE __m512i broadcast4(const uint8_t* p) {
  int32_t bytes;
  __builtin_memcpy(&bytes, p, 4);
  return _mm512_set1_epi32(bytes);
}

// Fewer rows read the weights faster than they could be fetched ahead.
constexpr int kLeastPrefetchRows = 3;

constexpr int sums_in_flight(int tile) { return tile >= 10 ? 1 : tile >= 5 ? 2 : 4; }

// What the tiles of a panel share, in locals: a store of bytes may alias the header, and every
// scalar instruction of a tile takes a place from its dot products.
struct Panel {
  explicit Panel(const IgemmTile& tile)
      : taps(tile.matrix->header->taps),
        quads(tile.matrix->header->depth / 4),
        depth(tile.matrix->header->depth),
        overlaps(overlaps_tail(tile.matrix->header->isa, depth)),
        tail(static_cast<__mmask16>((1u << (depth % 4)) - 1u)),
        weights(tile.panel),
        init(tile.matrix->init + tile.first_column),
        addend(tile.matrix->addend + tile.first_column),
        mult(tile.matrix->mult + tile.first_column),
        columns(tile.columns),
        bytes(tile.matrix->header->stores_plain_bytes() &&
              !tile.matrix->header->epilogue.has_residual) {}

  int64_t taps, quads, depth;
  bool overlaps;
  __mmask16 tail;  // of the bytes behind the last quad
  const int8_t* weights;
  const int32_t* init;
  const float *addend, *mult;
  int64_t columns;
  bool bytes;  // 8-bit outputs, straight from the accumulators
};

// Where the rows of a tile lie, as IgemmTile says, moving from tile to tile.
struct Rows {
  explicit Rows(const IgemmTile& tile)
      : pointers(tile.rows),
        pitch(tile.row_pitch),
        offset(tile.first_offset),
        stride(tile.row_stride) {}

  template <int R>
  inline __attribute__((always_inline)) void find(int64_t tap, const uint8_t* (&p)[R]) const {
    if (pitch == 0) {
      p[0] = pointers[tap] + offset;
#pragma GCC unroll 8
      for (int i = 1; i < R; ++i) p[i] = p[i - 1] + stride;
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) p[i] = pointers[i * pitch + tap];
    }
  }
  inline __attribute__((always_inline)) void advance(int64_t count) {
    pointers += count * pitch;
    offset += count * stride;
  }

  const uint8_t* const* pointers;
  int64_t pitch, offset, stride;
};

template <bool Flip>
QK_INLINE __m512i flipped(__m512i a) {
  return Flip ? _mm512_xor_si512(a, _mm512_set1_epi8(static_cast<char>(0x80))) : a;
}

// The sums of R rows x V vectors of columns. `Half`: the last vector has 8 columns or fewer, and
// one of sums holds those of two rows.
template <int R, int V, bool Half>
struct Sums {
  static constexpr int kFull = Half ? V - 1 : V, kShared = Half ? (R + 1) / 2 : 0;

  inline __attribute__((always_inline)) void start(const int32_t* init) {
#pragma GCC unroll 4
    for (int j = 0; j < kFull; ++j) {
      const __m512i v = _mm512_load_si512(init + 16 * j);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) full[i][j] = v;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kShared; ++i) shared[i] = load_half(init + 16 * kFull);
  }
  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kFull; ++j) full[i][j] = _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (int i = 0; i < kShared; ++i) shared[i] = _mm512_setzero_si512();
  }

  // Adds the products of four values of each row, quads.load(i), with a quad of the panel.
  template <bool Flip, typename Quads>
  inline __attribute__((always_inline)) void add_quad(const int8_t* b, const Quads& quads) {
    __m512i bv[V];
#pragma GCC unroll 4
    for (int j = 0; j < kFull; ++j) bv[j] = _mm512_load_si512(b + 64 * j);
    if (Half) bv[V - 1] = load_half(b + 64 * kFull);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      __m512i av = flipped<Flip>(quads.load(i));
#pragma GCC unroll 4
      for (int j = 0; j < kFull; ++j) dot(full[i][j], av, bv[j]);
      if (!Half || i % 2 == 1) continue;
      // The row that shares the vector is loaded again: kept, it would make gcc spill a sum.
      if (i + 1 < R) {
        av = _mm512_mask_mov_epi32(av, 0xff00, flipped<Flip>(quads.load(i + 1)));
      }
      dot(shared[i / 2], av, bv[V - 1]);
    }
  }

  inline __attribute__((always_inline)) void add(const Sums& other) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kFull; ++j) full[i][j] = _mm512_add_epi32(full[i][j], other.full[i][j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kShared; ++i) shared[i] = _mm512_add_epi32(shared[i], other.shared[i]);
  }

  // What lies behind the columns of a shared vector is of another row.
  inline __attribute__((always_inline)) __m512i vector(int i, int j) const {
    if (j < kFull) return full[i][j];
    const __m512i both = shared[Half ? i / 2 : 0];
    return i % 2 == 0 ? both : _mm512_shuffle_i64x2(both, both, 0x4e);
  }

  QK_INLINE __m512i load_half(const void* p) {
    return _mm512_broadcast_i64x4(_mm256_load_si256(static_cast<const __m256i*>(p)));
  }

  __m512i full[R][kFull > 0 ? kFull : 1], shared[Half ? kShared : 1];
};

// Four values of each row, from `offset` on.
template <int R>
struct Quads {
  inline __attribute__((always_inline)) __m512i load(int i) const {
    return broadcast4(p[i] + offset);
  }
  const uint8_t* const (&p)[R];
  int64_t offset;
};

// The values behind the last quad of each row.
template <int R>
struct Tails {
  inline __attribute__((always_inline)) __m512i load(int i) const {
    if (panel.overlaps) return broadcast4(p[i] + panel.depth - 4);
    return _mm512_broadcastd_epi32(_mm_maskz_loadu_epi8(panel.tail, p[i] + 4 * panel.quads));
  }
  const uint8_t* const (&p)[R];
  const Panel& panel;
};

// sums = init + sum over tap, k. `Flip`: A is int8.
template <int R, int V, bool Flip, bool Half>
QK_INLINE void multiply(const Panel& panel, const Rows& rows, int64_t ahead,
                        Sums<R, V, Half>& sums) {
  constexpr int S = sums_in_flight(Half ? R * (V - 1) + R / 2 : R * V);
  const int64_t taps = panel.taps, quads = panel.quads;
  const int8_t* b = panel.weights;
  Sums<R, V, Half> more[S];  // the first is not used
  sums.start(panel.init);
#pragma GCC unroll 4
  for (int s = 1; s < S; ++s) more[s].clear();
  for (int64_t tap = 0; tap < taps; ++tap) {
    const uint8_t* p[R];
    rows.find(tap, p);
    int64_t k = 0;
    for (; k + S <= quads; k += S) {
      if (R >= kLeastPrefetchRows) _mm_prefetch(b + ahead, _MM_HINT_T1);
      sums.template add_quad<Flip>(b, Quads<R>{p, 4 * k});
#pragma GCC unroll 4
      for (int s = 1; s < S; ++s) {
        more[s].template add_quad<Flip>(b + 64 * V * s, Quads<R>{p, 4 * (k + s)});
      }
      b += 64 * S * V;
    }
    for (; k < quads; ++k, b += 64 * V) sums.template add_quad<Flip>(b, Quads<R>{p, 4 * k});
    if (panel.tail != 0) {
      sums.template add_quad<Flip>(b, Tails<R>{p, panel});
      b += 64 * V;
    }
  }
#pragma GCC unroll 4
  for (int s = 1; s < S; ++s) sums.add(more[s]);
}

// Keeps gcc from moving the instruction that made `v` down to its use.
QK_INLINE void in_order(__m512i& v) { __asm__("" : "+v"(v)); }
QK_INLINE void in_order(__m512& v) { __asm__("" : "+v"(v)); }

// Rows of V vectors of columns that fill one vector of bytes.
constexpr int rows_in_group(int vectors) { return vectors == 1 ? 4 : vectors == 2 ? 2 : 1; }

// From rounded values to the bytes that are stored.
struct Packing {
  explicit Packing(const Epilogue& e)
      : constants(requantize64_constants(e)),
        shifts(e.zero_point != 0 || e.is_signed()),
        clamps(e.clamps()) {}
  Packing(const Epilogue& e, const ResidualAdd& add)
      : constants(residual64_constants(e)),
        shifts(add.zero_point != 0 || e.is_signed()),
        clamps(e.residual_clamps()) {}

  // Four vectors, columns in order.
  inline __attribute__((always_inline)) __m512i run(__m512i q0, __m512i q1, __m512i q2,
                                                    __m512i q3) const {
    __m512i low = _mm512_packs_epi32(q0, q1), high = _mm512_packs_epi32(q2, q3);
    if (shifts) {
      low = _mm512_adds_epi16(low, constants.zero_point);
      high = _mm512_adds_epi16(high, constants.zero_point);
    }
    __m512i bytes = _mm512_permutexvar_epi32(constants.order, _mm512_packus_epi16(low, high));
    if (clamps) {
      bytes = _mm512_min_epu8(_mm512_max_epu8(bytes, constants.low), constants.high);
      bytes = _mm512_xor_si512(bytes, constants.flip);
    }
    return bytes;
  }

  Requantize64 constants;
  bool shifts, clamps;  // whether the bytes have a zero point, and a clamp
};

// Bytes [0, n) of a vector of bytes to out[0], the next n of its next 64 / P bytes to out[1], ...
template <int P>
QK_INLINE void store_parts(uint8_t* const* out, int rows, int64_t n, __m512i bytes) {
  constexpr int64_t kPart = 64 / P;
  if (P == 1) {
    _mm512_mask_storeu_epi8(out[0], mask64(n), bytes);
  } else if (n == kPart && rows == P && out[P - 1] - out[0] == 64 - kPart) {
    _mm512_storeu_si512(out[0], bytes);
  } else if constexpr (P == 2) {
    const auto mask = static_cast<__mmask32>(mask64(n));
    _mm256_mask_storeu_epi8(out[0], mask, _mm512_castsi512_si256(bytes));
    if (rows > 1) _mm256_mask_storeu_epi8(out[1], mask, _mm512_extracti64x4_epi64(bytes, 1));
  } else if constexpr (P == 4) {
    const __mmask16 mask = mask16(n);
    _mm_mask_storeu_epi8(out[0], mask, _mm512_castsi512_si128(bytes));
    if (rows > 1) _mm_mask_storeu_epi8(out[1], mask, _mm512_extracti32x4_epi32(bytes, 1));
    if (rows > 2) _mm_mask_storeu_epi8(out[2], mask, _mm512_extracti32x4_epi32(bytes, 2));
    if (rows > 3) _mm_mask_storeu_epi8(out[3], mask, _mm512_extracti32x4_epi32(bytes, 3));
  }
}

// The 8-bit store without weight zero points, straight from the accumulators. A stage runs over all
// of the tile before the next: one vector's stages wait for each other. Narrow tiles pack several
// rows into a vector of bytes.
template <int R, int V>
QK_INLINE void store_bytes(const Panel& panel, const Packing& packing, uint8_t* const* out,
                           __m512i (&acc)[R][V]) {
  __m512 v[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) in_order(v[i][j] = _mm512_cvtepi32_ps(acc[i][j]));
  }
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    const __m512 addend = _mm512_load_ps(panel.addend + 16 * j);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) in_order(v[i][j] = _mm512_add_ps(v[i][j], addend));
  }
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    const __m512 mult = _mm512_load_ps(panel.mult + 16 * j);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) in_order(v[i][j] = _mm512_mul_ps(v[i][j], mult));
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) in_order(acc[i][j] = _mm512_cvtps_epi32(v[i][j]));
  }
  constexpr int kRows = rows_in_group(V);
#pragma GCC unroll 8
  for (int i = 0; i < R; i += kRows) {
    __m512i q[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int row = i + j / V, vector = j % V;
      q[j] = j < kRows * V && row < R ? acc[row < R ? row : 0][vector] : acc[i][0];
    }
    const __m512i bytes = packing.run(q[0], q[1], q[2], q[3]);
    store_parts<kRows>(out + i, R - i < kRows ? R - i : kRows, panel.columns, bytes);
  }
}

// Every other output, by way of memory.
template <int R, int V>
QK_INLINE void store_any(const IgemmTile& tile, const __m512i (&acc)[R][V]) {
  alignas(64) int32_t memory[R][64];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) _mm512_store_si512(&memory[i][16 * j], acc[i][j]);
  }
  select_store(*tile.matrix->header, V, tile.residual_signed)(tile, memory[0], 0, R);
}

// `tiles` tiles of R rows, one below the other.
template <int R, int V, bool Flip, bool Half>
__attribute__((noinline)) void run_tiles_avx512(IgemmTile& tile, int64_t tiles) {
  const Panel panel(tile);
  const Packing packing(tile.matrix->header->epilogue);
  Rows rows(tile);
  uint8_t* const* out = tile.out;
  for (int64_t left = tiles; left > 0; --left) {
    Sums<R, V, Half> sums;
    multiply<R, V, Flip, Half>(panel, rows, tile.ahead, sums);
    __m512i acc[R][V];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[i][j] = sums.vector(i, j);
    }
    if (panel.bytes) {
      store_bytes<R, V>(panel, packing, out, acc);
    } else {
      store_any<R, V>(tile, acc);
      tile.advance(R);
    }
    rows.advance(R);
    out += R;
    tile.fetch_next_lines();
  }
  if (panel.bytes) tile.advance(R * tiles);
}

#include "csrc/gemm/x86_avx512_pipeline.h"

#include "csrc/gemm/x86_avx512_interleaved.h"

// Two of the widths, those of many networks' narrow layers (24 and 40 columns).
constexpr bool shares_vectors(int vectors) { return vectors == 2 || vectors == 3; }

template <int R, int V, bool Flip, bool Half>
QK_INLINE void run_half(bool pipelined, int64_t tiles, IgemmTile& tile) {
  if constexpr (fits_pipeline(R, V)) {
    if (pipelined && tiles > 1) return run_pipeline<R, V, Flip, Half>(tile, tiles);
  }
  run_tiles_avx512<R, V, Flip, Half>(tile, tiles);
}

template <int R, int V, bool Flip>
QK_INLINE void run_height(bool pipelined, int64_t tiles, IgemmTile& tile) {
  if constexpr (shares_vectors(V) && R > 1) {
    if (tile.columns <= 16 * V - 8) return run_half<R, V, Flip, true>(pipelined, tiles, tile);
  }
  run_half<R, V, Flip, false>(pipelined, tiles, tile);
}

template <int V, bool Flip>
QK_INLINE void run_rows(bool pipelined, int64_t rows, int64_t tiles, IgemmTile& tile) {
  switch (rows) {
    case 1:
      return run_height<1, V, Flip>(pipelined, tiles, tile);
    case 2:
      return run_height<2, V, Flip>(pipelined, tiles, tile);
    case 3:
      return run_height<3, V, Flip>(pipelined, tiles, tile);
    case 4:
      return run_height<4, V, Flip>(pipelined, tiles, tile);
    case 5:
      return run_height<5, V, Flip>(pipelined, tiles, tile);
    case 6:
      return run_height<6, V, Flip>(pipelined, tiles, tile);
  }
  if constexpr (V < 4) {
    return rows == 7 ? run_height<7, V, Flip>(pipelined, tiles, tile)
                     : run_height<8, V, Flip>(pipelined, tiles, tile);
  }
}

template <bool Flip>
struct Avx512VnniTile {
  static constexpr Isa kIsa = Isa::kAvx512Vnni;
  using Copy = InPlace;
  // A block is a multiple of it; panels of another width, and tiles that do not interleave, cut the
  // block as they like.
  static int64_t max_rows(const PackedHeader& header, int64_t vectors) {
    const int64_t columns = vectors == 4 ? 64 : header.n % 64;
    return may_interleave(header, columns) ? interleaved_rows(columns) : most_rows(header, vectors);
  }
  static int64_t most_rows(const PackedHeader& header, int64_t vectors) {
    if (pays_to_pipeline(header)) return pipelined_rows(vectors);
    return vectors == 4 ? 6 : 8;
  }
  static void tile(int64_t rows, int64_t vectors, IgemmTile tile) {
    const PackedHeader& header = *tile.matrix->header;
    if (interleaves(tile)) rows -= run_interleaved_tiles(rows, tile);
    if (rows == 0) return;
    const EvenTiles even = even_tiles(rows, most_rows(header, vectors));
    const bool pipelined = pays_to_pipeline(header);
    if (even.larger > 0) run(pipelined, even.rows + 1, even.larger, vectors, tile);
    run(pipelined, even.rows, even.tiles - even.larger, vectors, tile);
  }
  // All full tiles; returns their rows. One alone has nothing to be interleaved with.
  static int64_t run_interleaved_tiles(int64_t rows, IgemmTile& tile) {
    const int64_t height = interleaved_rows(tile.columns), tiles = rows / height;
    if (tiles < 2) return 0;
    if (tile.columns == 64) run_interleaved<64, Flip>(tile, tiles);
    if constexpr (!Flip) {
      if (tile.columns == 32) run_interleaved<32, false>(tile, tiles);
      if (tile.columns == 24) run_interleaved<24, false>(tile, tiles);
      if (tile.columns == 16) run_interleaved<16, false>(tile, tiles);
    }
    return tiles * height;
  }
  static void run(bool pipelined, int64_t rows, int64_t tiles, int64_t vectors, IgemmTile& tile) {
    switch (vectors) {
      case 1:
        return run_rows<1, Flip>(pipelined, rows, tiles, tile);
      case 2:
        return run_rows<2, Flip>(pipelined, rows, tiles, tile);
      case 3:
        return run_rows<3, Flip>(pipelined, rows, tiles, tile);
      default:
        return run_rows<4, Flip>(pipelined, rows, tiles, tile);
    }
  }
};

}  // namespace

void igemm_avx512vnni(const IgemmBlock& block) {
  if (block.args.matrix.header->input_signed) {
    igemm_blocks<Avx512VnniTile<true>>(block);
  } else {
    igemm_blocks<Avx512VnniTile<false>>(block);
  }
}

}  // namespace qk
QK_TARGET_END
