// AMX: blocks of up to 32 rows x 32 columns in four tile registers; small blocks go to AVX512-VNNI.
//
// Trick: the panel layout of AVX512-VNNI is what tdpbusd wants: 16 quads of K are the 16 rows of a
// B
//   tile, 16 columns x 4 bytes its 64 bytes. The taps follow each other without a gap, so K is one
//   run of taps * depth bytes (depth padded to 4) and only its last tile is partial: there A is
//   zero, and what B holds does not matter (the packed bytes end with kAmxTailBytes of slack). Rows
//   of A that lie at one stride and in whole tiles are loaded where they are; all others are first
//   copied to a stack buffer that every panel reuses. The sums start from init by a tile load with
//   stride 0.
#include <immintrin.h>

#include "csrc/base/target.h"
#include "csrc/gemm/igemm.h"

QK_TARGET_BEGIN(QK_ISA_AMX)
namespace qk {
namespace {

#include "csrc/gemm/x86_driver.h"

#include "csrc/gemm/x86_avx512_epilogue.h"

#include "csrc/gemm/x86_avx512_store.h"

constexpr int64_t kTileRows = 16, kTileBytes = 64, kBlockRows = 32;
// With fewer rows or fewer weights in a panel a tile is mostly empty, and its store costs more than
// the sums: measured break-even against AVX512-VNNI.
// In a single column of tiles, as grouped convolutions have them, the copies of A cost more.
constexpr int64_t kMinRows = 5, kMinPanelWeights = 2048, kNarrow = 16;
// Longest row that the stack buffer takes: 32 rows of it are 288 KiB.
constexpr int64_t kMaxRowBytes = 9 * 1024;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kTileBytes, kTileBytes, kTileBytes, kTileBytes,
                            kTileBytes, kTileBytes, kTileBytes, kTileBytes};
  uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows,
                      kTileRows, kTileRows, kTileRows, kTileRows};
};

// Where a block of rows of A lies, as tiles see it.
struct TileRows {
  const uint8_t* a;
  int64_t stride;
};

// c[32][64] = init + a * b for R * 16 rows and C * 16 columns, R and C in {1, 2}.
template <int R, int C>
QK_INLINE void multiply_tiles(TileRows rows, const int8_t* b, int64_t b_stride, int64_t steps,
                              const int32_t* init, int32_t* c) {
  const int64_t zero = 0, c_stride = 256;
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(init), "r"(zero) : "memory");
  if (R == 2) __asm__ volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(init), "r"(zero) : "memory");
  if (C == 2) {
    __asm__ volatile("tileloadd 64(%0,%1,1), %%tmm1" ::"r"(init), "r"(zero) : "memory");
    if (R == 2) __asm__ volatile("tileloadd 64(%0,%1,1), %%tmm3" ::"r"(init), "r"(zero) : "memory");
  }
  const uint8_t* a0 = rows.a;
  const uint8_t* a1 = rows.a + kTileRows * rows.stride;
  for (int64_t step = 0; step < steps; ++step) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(a0), "r"(rows.stride) : "memory");
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm6" ::"r"(b), "r"(b_stride) : "memory");
    if (R == 2) {
      __asm__ volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(a1), "r"(rows.stride) : "memory");
    }
    if (C == 2) {
      __asm__ volatile("tileloadd 64(%0,%1,1), %%tmm7" ::"r"(b), "r"(b_stride) : "memory");
    }
    __asm__ volatile("tdpbusd %%tmm6, %%tmm4, %%tmm0" ::: "memory");
    if (C == 2) __asm__ volatile("tdpbusd %%tmm7, %%tmm4, %%tmm1" ::: "memory");
    if (R == 2) __asm__ volatile("tdpbusd %%tmm6, %%tmm5, %%tmm2" ::: "memory");
    if (R == 2 && C == 2) __asm__ volatile("tdpbusd %%tmm7, %%tmm5, %%tmm3" ::: "memory");
    a0 += kTileBytes;
    a1 += kTileBytes;
    b += 16 * b_stride;
  }
  __asm__ volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(c), "r"(c_stride) : "memory");
  if (C == 2) {
    __asm__ volatile("tilestored %%tmm1, 64(%0,%1,1)" ::"r"(c), "r"(c_stride) : "memory");
  }
  if (R == 2) {
    int32_t* lower = c + kTileRows * 64;
    __asm__ volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(lower), "r"(c_stride) : "memory");
    if (C == 2) {
      __asm__ volatile("tilestored %%tmm3, 64(%0,%1,1)" ::"r"(lower), "r"(c_stride) : "memory");
    }
  }
}

template <int R>
QK_INLINE void multiply_panel(TileRows rows, const IgemmTile& tile, int64_t vectors, int64_t steps,
                              int32_t* c) {
  const int32_t* init = tile.matrix.init + tile.first_column;
  for (int64_t j = 0; j < vectors; j += 2) {
    if (vectors - j >= 2) {
      multiply_tiles<R, 2>(rows, tile.panel + 64 * j, 64 * vectors, steps, init + 16 * j,
                           c + 16 * j);
    } else {
      multiply_tiles<R, 1>(rows, tile.panel + 64 * j, 64 * vectors, steps, init + 16 * j,
                           c + 16 * j);
    }
  }
}

// Copies one row, its taps one after the other, zero up to a whole tile.
QK_INLINE void copy_row(const uint8_t* const* taps, const PackedHeader& header, __m512i flip,
                        uint8_t* dst, int64_t row_bytes) {
  const int64_t padded_depth = round_up(header.depth, 4);
  uint8_t* const end = dst + row_bytes;
  for (int64_t tap = 0; tap < header.taps; ++tap, dst += padded_depth) {
    const uint8_t* a = taps[tap];
    int64_t k = 0;
    for (; k + 64 <= header.depth; k += 64) {
      _mm512_storeu_si512(dst + k, _mm512_xor_si512(_mm512_loadu_si512(a + k), flip));
    }
    if (k < padded_depth) {
      const __mmask64 mask = mask64(header.depth - k);
      const __m512i bytes = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, a + k), flip);
      _mm512_mask_storeu_epi8(dst + k, mask64(padded_depth - k), bytes);
    }
  }
  if (dst < end) _mm512_mask_storeu_epi8(dst, mask64(end - dst), _mm512_setzero_si512());
}

struct AmxTile {
  static constexpr Isa kIsa = Isa::kAmx;
  static constexpr int64_t max_rows(int64_t) { return kBlockRows; }
  // Whole blocks, then the rest: 40 rows are 32 + 8, so that one tile less is computed.
  static constexpr int64_t next_rows(int64_t left, int64_t most) {
    return left < most ? left : most;
  }

  uint8_t* buffer;
  TileRows rows;
  int64_t steps;

  void begin_rows(const uint8_t* const* sources, int64_t count, const IgemmArgs& args) {
    const PackedHeader& header = *args.matrix.header;
    const int64_t row_bytes = round_up(header.taps * round_up(header.depth, 4), kTileBytes);
    steps = row_bytes / kTileBytes;
    const bool in_place = args.pointers == nullptr && header.depth == row_bytes &&
                          !header.input_signed && count % kTileRows == 0 &&
                          args.a_row_stride % 2048 != 0;
    if (in_place) {
      rows = {sources[0], args.a_row_stride};
      return;
    }
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(header.input_signed ? 0x80 : 0));
    const int64_t stride = row_bytes | kTileBytes;  // an odd number of lines: rows spread over L1
    for (int64_t i = 0; i < count; ++i) {
      copy_row(sources + i * header.taps, header, flip, buffer + i * stride, row_bytes);
    }
    rows = {buffer, stride};
  }

  void tile(int64_t count, int64_t vectors, const IgemmTile& tile) const {
    alignas(64) int32_t sums[kBlockRows][64];
    if (count > kTileRows) {
      multiply_panel<2>(rows, tile, vectors, steps, sums[0]);
    } else {
      multiply_panel<1>(rows, tile, vectors, steps, sums[0]);
    }
    store_sums(tile, sums[0], count, vectors);
  }
};

}  // namespace

void igemm_amx(const IgemmBlock& block) {
  const PackedHeader& header = *block.args.matrix.header;
  const int64_t row_bytes = header.taps * round_up(header.depth, 4);
  const int64_t columns = header.n - 64 * block.panel_begin;
  const bool mostly_empty = block.row_end - block.row_begin < kMinRows || columns <= kNarrow ||
                            row_bytes * (columns < 64 ? columns : 64) < kMinPanelWeights;
  if (mostly_empty || row_bytes > kMaxRowBytes) {
    igemm_avx512vnni(block);
    return;
  }
  const TileConfig config;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
  alignas(64) uint8_t buffer[kBlockRows * (kMaxRowBytes + kTileBytes)];
  AmxTile kernel{buffer, {}, 0};
  igemm_blocks(block, kernel);
  __asm__ volatile("tilerelease");
}

}  // namespace qk
QK_TARGET_END
