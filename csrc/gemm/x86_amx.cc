// AMX: blocks of up to 32 rows x 32 columns in four tile registers; small blocks go to AVX512-VNNI.
//
// Trick: the panel layout of AVX512-VNNI is what tdpbusd wants: 16 quads of K are the 16 rows of a
//   tile of B, 16 columns x 4 bytes its 64 bytes. Rows of A are loaded where they lie if their taps
//   are whole tiles and evenly spaced, as the pixels of an image row are; a half of a block is cut
//   to such a run, with as many rows in the tile configuration. Everything else is first copied to
//   a stack buffer that all panels reuse. There the taps follow each other without a gap, so K is
//   one run whose last tile is partial: A is zero there, and what B holds does not matter (the
//   packed bytes end with kAmxTailBytes of slack). The sums start from init by a tile load with
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
// Copies of A on the stack; longer rows go to AVX512-VNNI.
constexpr int64_t kBufferBytes = 256 * 1024;
// Taps that are loaded in place, and the shortest run of rows worth a tile of its own.
constexpr int64_t kMaxTaps = 64, kMinRun = 4;

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

// Up to 16 rows of A, evenly spaced.
struct TileRows {
  const uint8_t* a;
  int64_t stride;
};

// A block's rows of A: two halves of up to 16 rows. K is cut into segments (the taps, or one that
// holds them all) of `steps` tiles; in a segment each half has its own place and spacing.
struct BlockRows {
  const TileRows (*segments)[2];
  int64_t count, steps;
};

// c[32][64] = init + a * b, for R halves and C * 16 columns, R and C in {1, 2}.
template <int R, int C>
QK_INLINE void multiply_tiles(const BlockRows& block, const int8_t* b, int64_t b_stride,
                              const int32_t* init, int32_t* c) {
  const int64_t zero = 0, c_stride = 256;
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(init), "r"(zero) : "memory");
  if (R == 2) __asm__ volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(init), "r"(zero) : "memory");
  if (C == 2) {
    __asm__ volatile("tileloadd 64(%0,%1,1), %%tmm1" ::"r"(init), "r"(zero) : "memory");
    if (R == 2) __asm__ volatile("tileloadd 64(%0,%1,1), %%tmm3" ::"r"(init), "r"(zero) : "memory");
  }
  for (int64_t segment = 0; segment < block.count; ++segment) {
    TileRows upper = block.segments[segment][0], lower = block.segments[segment][1];
    for (int64_t step = 0; step < block.steps; ++step) {
      __asm__ volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(upper.a), "r"(upper.stride) : "memory");
      __asm__ volatile("tileloadd (%0,%1,1), %%tmm6" ::"r"(b), "r"(b_stride) : "memory");
      if (R == 2) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(lower.a), "r"(lower.stride)
                         : "memory");
      }
      if (C == 2) {
        __asm__ volatile("tileloadd 64(%0,%1,1), %%tmm7" ::"r"(b), "r"(b_stride) : "memory");
      }
      __asm__ volatile("tdpbusd %%tmm6, %%tmm4, %%tmm0" ::: "memory");
      if (C == 2) __asm__ volatile("tdpbusd %%tmm7, %%tmm4, %%tmm1" ::: "memory");
      if (R == 2) __asm__ volatile("tdpbusd %%tmm6, %%tmm5, %%tmm2" ::: "memory");
      if (R == 2 && C == 2) __asm__ volatile("tdpbusd %%tmm7, %%tmm5, %%tmm3" ::: "memory");
      upper.a += kTileBytes;
      lower.a += kTileBytes;
      b += 16 * b_stride;
    }
  }
  __asm__ volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(c), "r"(c_stride) : "memory");
  if (C == 2) {
    __asm__ volatile("tilestored %%tmm1, 64(%0,%1,1)" ::"r"(c), "r"(c_stride) : "memory");
  }
  if (R == 2) {
    int32_t* half = c + kTileRows * 64;
    __asm__ volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(half), "r"(c_stride) : "memory");
    if (C == 2) {
      __asm__ volatile("tilestored %%tmm3, 64(%0,%1,1)" ::"r"(half), "r"(c_stride) : "memory");
    }
  }
}

template <int R>
QK_INLINE void multiply_panel(const BlockRows& block, const IgemmTile& tile, int64_t vectors,
                              int32_t* c) {
  const int32_t* init = tile.matrix.init + tile.first_column;
  for (int64_t j = 0; j < vectors; j += 2) {
    const int8_t* b = tile.panel + 64 * j;
    if (vectors - j >= 2) {
      multiply_tiles<R, 2>(block, b, 64 * vectors, init + 16 * j, c + 16 * j);
    } else {
      multiply_tiles<R, 1>(block, b, 64 * vectors, init + 16 * j, c + 16 * j);
    }
  }
}

// Copies rows of A; int8 becomes uint8.
class RowCopier {
 public:
  explicit RowCopier(const PackedHeader& header)
      : taps_(header.taps),
        depth_(header.depth),
        whole_(header.depth / 64 * 64),
        padded_depth_(round_up(header.depth, 4)),
        load_mask_(mask64(header.depth - whole_)),
        store_mask_(mask64(padded_depth_ - whole_)),
        flip_(_mm512_set1_epi8(static_cast<char>(header.input_signed ? 0x80 : 0))) {}

  // One row, its taps one after the other, zero up to a whole tile.
  void all_taps(const uint8_t* const* taps, uint8_t* dst, int64_t row_bytes) const {
    uint8_t* const end = dst + row_bytes;
    for (int64_t tap = 0; tap < taps_; ++tap, dst += padded_depth_) one_tap(taps[tap], dst);
    if (dst < end) _mm512_mask_storeu_epi8(dst, mask64(end - dst), _mm512_setzero_si512());
  }

  void one_tap(const uint8_t* a, uint8_t* dst) const {
    for (int64_t k = 0; k < whole_; k += 64) {
      _mm512_storeu_si512(dst + k, _mm512_xor_si512(_mm512_loadu_si512(a + k), flip_));
    }
    if (whole_ < depth_) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(load_mask_, a + whole_);
      _mm512_mask_storeu_epi8(dst + whole_, store_mask_, _mm512_xor_si512(bytes, flip_));
    }
  }

 private:
  int64_t taps_, depth_, whole_, padded_depth_;
  __mmask64 load_mask_, store_mask_;
  __m512i flip_;
};

// How many of `most` pointers, `step` apart, are evenly spaced from the first on.
QK_INLINE int64_t evenly_spaced(const uint8_t* const* pointers, int64_t step, int64_t most) {
  if (most < 3) return most;
  const int64_t spacing = pointers[step] - pointers[0];
  int64_t n = 2;
  while (n < most && pointers[n * step] - pointers[(n - 1) * step] == spacing) ++n;
  return n;
}

// Of eight taps side by side in `rows` rows of pointers, those that are evenly spaced.
QK_INLINE __mmask8 evenly_spaced_taps(const uint8_t* const* pointers, int64_t taps, int64_t rows,
                                      __mmask8 lanes) {
  if (rows < 3) return lanes;
  __m512i before = _mm512_maskz_loadu_epi64(lanes, pointers + taps);
  const __m512i spacing = _mm512_sub_epi64(before, _mm512_maskz_loadu_epi64(lanes, pointers));
  __mmask8 even = lanes;
  for (int64_t i = 2; i < rows; ++i) {
    const __m512i now = _mm512_maskz_loadu_epi64(lanes, pointers + i * taps);
    even = _mm512_mask_cmpeq_epi64_mask(even, _mm512_sub_epi64(now, before), spacing);
    before = now;
  }
  return even;
}

class AmxTile {
 public:
  static constexpr Isa kIsa = Isa::kAmx;
  static constexpr int64_t max_rows(int64_t) { return kBlockRows; }

  AmxTile(const IgemmArgs& args, uint8_t* buffer)
      : header_(*args.matrix.header),
        copier_(header_),
        buffer_(buffer),
        row_bytes_(round_up(header_.taps * round_up(header_.depth, 4), kTileBytes)),
        whole_taps_(header_.depth % kTileBytes == 0 && header_.taps <= kMaxTaps &&
                    !header_.input_signed) {
    block_ = whole_taps_ ? BlockRows{segments_, header_.taps, header_.depth / kTileBytes}
                         : BlockRows{segments_, 1, row_bytes_ / kTileBytes};
  }

  // Two halves; with row pointers a half ends where the even spacing of the first tap ends (an
  // image row), and long runs are cut evenly: 28 pixels are 14 + 14.
  int64_t next_rows(const IgemmArgs& args, int64_t row, int64_t left) {
    int64_t run = left < kBlockRows ? left : kBlockRows;
    const bool pointers = args.pointers != nullptr && whole_taps_;
    if (pointers) run = evenly_spaced(args.pointers + row * header_.taps, header_.taps, run);
    rows_[0] = half_rows(run, left);
    left -= rows_[0];
    row += rows_[0];
    if (run > rows_[0]) {
      run -= rows_[0];
    } else {
      run = left < kTileRows ? left : kTileRows;
      if (pointers) run = evenly_spaced(args.pointers + row * header_.taps, header_.taps, run);
    }
    rows_[1] = half_rows(run, left);
    return rows_[0] + rows_[1];
  }

  void begin_rows(const uint8_t* const* sources, int64_t, const IgemmArgs& args) {
    configure();
    for (int half = 0; half < 2 && rows_[half] > 0; ++half) {
      const uint8_t* const* first = sources + (half == 0 ? 0 : rows_[0]) * header_.taps;
      if (!whole_taps_) {
        segments_[0][half] = copied_rows(first, half);
      } else if (args.pointers == nullptr) {
        segments_[0][half] = strided_rows(first, half);
      } else {
        find_taps(first, half);
      }
    }
  }

  void tile(int64_t, int64_t vectors, const IgemmTile& tile) const {
    alignas(64) int32_t sums[kBlockRows][64];
    if (rows_[1] > 0) {
      multiply_panel<2>(block_, tile, vectors, sums[0]);
    } else {
      multiply_panel<1>(block_, tile, vectors, sums[0]);
    }
    store_sums(tile, sums[0], rows_[0], vectors);
    if (rows_[1] == 0) return;
    IgemmTile lower = tile;
    lower.advance(rows_[0]);
    store_sums(lower, sums[kTileRows], rows_[1], vectors);
  }

 private:
  // Rows of a half from a run of `run` evenly spaced rows (known up to two halves).
  static int64_t half_rows(int64_t run, int64_t left) {
    const int64_t most = left < kTileRows ? left : kTileRows;
    if (run < kMinRun) return most;
    return run <= kTileRows ? run : (run + 1) / 2;
  }

  // The tiles' rows of this block; loading a configuration zeroes all tiles, which are unused here.
  void configure() {
    if (rows_[0] == configured_[0] && rows_[1] == configured_[1]) return;
    configured_[0] = rows_[0];
    configured_[1] = rows_[1];
    TileConfig config;
    const auto upper = static_cast<uint8_t>(rows_[0]);
    const auto lower = static_cast<uint8_t>(rows_[1] > 0 ? rows_[1] : kTileRows);
    config.rows[0] = config.rows[1] = config.rows[4] = upper;
    config.rows[2] = config.rows[3] = config.rows[5] = lower;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }

  // The taps of one half where they lie, or a copy where the rows are not evenly spaced.
  void find_taps(const uint8_t* const* pointers, int half) {
    const int64_t taps = header_.taps, rows = rows_[half];
    for (int64_t tap = 0; tap < taps; tap += 8) {
      const __mmask8 lanes =
          static_cast<__mmask8>(taps - tap >= 8 ? 0xff : (1 << (taps - tap)) - 1);
      const __mmask8 even = evenly_spaced_taps(pointers + tap, taps, rows, lanes);
      for (int64_t t = tap; t < taps && t < tap + 8; ++t) {
        segments_[t][half] =
            (even >> (t - tap)) & 1
                ? TileRows{pointers[t], rows > 1 ? pointers[taps + t] - pointers[t] : 0}
                : copied_tap(pointers + t, t, half);
      }
    }
  }

  TileRows copied_tap(const uint8_t* const* pointers, int64_t tap, int half) const {
    const int64_t taps = header_.taps, stride = header_.depth | kTileBytes;
    uint8_t* dst = buffer_ + (half * taps + tap) * kTileRows * stride;
    for (int64_t i = 0; i < rows_[half]; ++i) copier_.one_tap(pointers[i * taps], dst + i * stride);
    return {dst, stride};
  }

  // Rows a multiple of 2 KiB apart fall into few sets of L1: those are copied.
  TileRows strided_rows(const uint8_t* const* rows, int half) const {
    const int64_t stride = rows_[half] > 1 ? rows[1] - rows[0] : 0;
    if (stride % 2048 == 0 && rows_[half] > 1) return copied_rows(rows, half);
    return {rows[0], stride};
  }

  TileRows copied_rows(const uint8_t* const* sources, int half) const {
    const int64_t stride = row_bytes_ | kTileBytes;  // an odd number of lines: spread over L1
    uint8_t* dst = buffer_ + half * kTileRows * stride;
    for (int64_t i = 0; i < rows_[half]; ++i) {
      copier_.all_taps(sources + i * header_.taps, dst + i * stride, row_bytes_);
    }
    return {dst, stride};
  }

  const PackedHeader& header_;
  const RowCopier copier_;
  uint8_t* const buffer_;
  const int64_t row_bytes_;
  const bool whole_taps_;
  TileRows segments_[kMaxTaps][2];
  BlockRows block_;
  int64_t rows_[2] = {}, configured_[2] = {};
};

}  // namespace

void igemm_amx(const IgemmBlock& block) {
  const PackedHeader& header = *block.args.matrix.header;
  const int64_t row_bytes = header.taps * round_up(header.depth, 4);
  const int64_t columns = header.n - 64 * block.panel_begin;
  const bool mostly_empty = block.row_end - block.row_begin < kMinRows || columns <= kNarrow ||
                            row_bytes * (columns < 64 ? columns : 64) < kMinPanelWeights;
  const int64_t copied_bytes =
      kBlockRows * (round_up(row_bytes, kTileBytes) + kTileBytes * header.taps);
  if (mostly_empty || copied_bytes > kBufferBytes) {
    igemm_avx512vnni(block);
    return;
  }
  alignas(64) uint8_t buffer[kBufferBytes];
  AmxTile kernel(block.args, buffer);
  igemm_blocks(block, kernel);
  __asm__ volatile("tilerelease");
}

}  // namespace qk
QK_TARGET_END
