// AMX: pairs of tiles of up to 16 rows x 64 columns; small problems go to AVX512-VNNI.
//
// Trick: the panel layout of AVX512-VNNI is what tdpbusd wants: 16 quads of K are the 16 rows of a
//   tile of B, 16 columns x 4 bytes its 64 bytes. Rows of A are loaded where they lie if they are
//   evenly spaced (a matrix, or the pixels of an image row) and depth cuts into equal steps of
//   whole quads; the tile configuration has the bytes of a step, so nothing is padded or read too
//   far. A stretch of evenly spaced rows is cut into tiles of one height, so that one configuration
//   serves the whole call; the last tile of a stretch starts early instead of being lower, and what
//   it computes twice is stored once. Other rows are first copied to a stack buffer that all panels
//   reuse: taps follow each other without a gap, zero up to a whole tile, and what B holds there
//   does not matter (the packed bytes end with kAmxTailBytes of slack).
//   The sums of a panel go to memory, and their epilogue runs row by row between the tile products
//   of the next panel (x86_amx_finish.h): the tile unit and the vector units work side by side.
#include <immintrin.h>

#include <initializer_list>

#include "csrc/base/target.h"
#include "csrc/gemm/igemm.h"

QK_TARGET_BEGIN(QK_ISA_AMX)
namespace qk {
namespace {

#include "csrc/gemm/x86_driver.h"

#include "csrc/gemm/x86_avx512_epilogue.h"

#include "csrc/gemm/x86_avx512_store.h"

#include "csrc/gemm/x86_amx_finish.h"

// Behind a tile instruction of a step: where the other thread of the core is busy, two of them in a
// row wait for each other. With seven micro-operations in between a step of 2 x 2 tiles takes 170
// cycles instead of 300 there, and 65 either way on a core alone (bench/csrc/bench_tiles.cc).
#define QK_APART "\n\t.nops 8, 1"
#define QK_LOAD_TILE(operands, from, stride) \
  __asm__ volatile("tileloadd " operands QK_APART ::"r"(from), "r"(stride) : "memory")
#define QK_MULTIPLY_TILES(operands) __asm__ volatile("tdpbusd " operands QK_APART ::: "memory")
#define QK_STORE_TILE(operands, to, stride) \
  __asm__ volatile("tilestored " operands::"r"(to), "r"(stride) : "memory")

constexpr int64_t kTileBytes = 64;
// Copies of A on the stack; longer rows go to AVX512-VNNI.
constexpr int64_t kMostCopied = 256 * 1024;
// Shorter stretches leave too much of a tile empty: copied.
constexpr int64_t kMinStretch = 4;
// The most vectors of an epilogue between two products. Where there would be more, they all come
// behind the four products of a step: beside products only one of two ports for float32 is free.
constexpr int64_t kMostBetween = 16;
// The most bytes that are fetched between two steps: about what comes from L3 meanwhile.
constexpr int64_t kMostAhead = 1024;
// The weights of a panel that pay for copies of A.
constexpr int64_t kMinCopiedWeights = 2048;

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
  void row(const uint8_t* const* taps, int64_t offset, uint8_t* dst, int64_t row_bytes) const {
    uint8_t* const end = dst + row_bytes;
    for (int64_t tap = 0; tap < taps_; ++tap, dst += padded_depth_) copy(taps[tap] + offset, dst);
    if (dst < end) _mm512_mask_storeu_epi8(dst, mask64(end - dst), _mm512_setzero_si512());
  }

 private:
  void copy(const uint8_t* a, uint8_t* dst) const {
    for (int64_t k = 0; k < whole_; k += 64) {
      _mm512_storeu_si512(dst + k, _mm512_xor_si512(_mm512_loadu_si512(a + k), flip_));
    }
    if (whole_ < depth_) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(load_mask_, a + whole_);
      _mm512_mask_storeu_epi8(dst + whole_, store_mask_, _mm512_xor_si512(bytes, flip_));
    }
  }

  int64_t taps_, depth_, whole_, padded_depth_;
  __mmask64 load_mask_, store_mask_;
  __m512i flip_;
};

// How rows become tiles: stretches of `length` rows in `tiles` tiles of `height` rows.
struct Stretches {
  int64_t length, tiles, height;
};
QK_INLINE Stretches cut_stretches(int64_t rows, int64_t length) {
  // One long stretch is cut into pairs of tiles.
  const int64_t most = length == rows && rows > kTileRows ? kPairRows : kTileRows;
  int64_t tiles = (length + most - 1) / most * (most / kTileRows);
  const int64_t height = (length + tiles - 1) / tiles;
  tiles = (length + height - 1) / height;
  return {length, tiles, height};
}

// Bytes of a copied row, whose taps follow each other, up to a whole tile; from one such row to the
// next, an odd number of lines: spread over L1.
QK_INLINE int64_t joined_bytes(const PackedHeader& header) {
  return round_up(header.taps * round_up(header.depth, 4), kTileBytes);
}
QK_INLINE int64_t joined_stride(const PackedHeader& header) {
  return joined_bytes(header) | kTileBytes;
}

class AmxRows {
 public:
  AmxRows(const IgemmBlock& block, bool in_place, uint8_t* buffer)
      : block_(block),
        args_(block.args),
        header_(*args_.matrix.header),
        copier_(header_),
        buffer_(buffer),
        in_place_(in_place),
        row_bytes_(joined_bytes(header_)),
        rows_(block.row_end - block.row_begin),
        stretches_(cut_stretches(rows_, in_place && args_.pointers ? args_.run : rows_)),
        context_{args_.matrix, args_.residual_signed, block.lookup,
                 output_bytes(header_.epilogue.output)} {
    if (in_place) {
      step_bytes_ = tile_step(header_.depth);
      steps_ = header_.depth / step_bytes_;
      segments_ = header_.taps;
    } else {
      steps_ = row_bytes_ / kTileBytes;
    }
  }

  void run() {
    configure();
    const int64_t tiles = rows_ / stretches_.length * stretches_.tiles;
    plan_ahead(tiles);
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      const int64_t halves = tiles - tile < 2 ? 1 : 2;
      for (int64_t half = 0; half < halves; ++half) {
        find_half(tile + half, half);
        find_rows(half);
      }
      Places& places = places_[tile / 2 % 2];
      find_places(halves_[0].rows + (halves == 2 ? halves_[1].rows : 0), places);
      halves == 2 ? all_panels<2>(places) : all_panels<1>(places);
    }
    with_finish([&](auto finish) { this->rest<typename decltype(finish)::Type>(); });
    __asm__ volatile("tilerelease");
  }

 private:
  // Spreads the panels behind the last one over the steps of the passes of `tiles` over all panels.
  // A single tile waits for L2 at each step, and fetching a line that is there already takes the
  // place of a load: it fetches some, and the hardware those in between.
  void plan_ahead(int64_t tiles) {
    const int64_t panels = block_.panel_end - block_.panel_begin;
    const int64_t left = args_.panel_end - block_.panel_end;
    const int64_t products = (tiles + 1) / 2 * panels * segments_ * steps_ * 2;
    ahead_line_ = tiles == 1 ? 512 : 64;
    if (left > 0) {
      const int64_t bytes = (left < panels ? left : panels) * header_.panel_bytes;
      ahead_ = args_.matrix.panels + block_.panel_end * header_.panel_bytes;
      ahead_step_ = round_up((bytes + products - 1) / products, ahead_line_);
    } else if (args_.next.bytes > 0) {
      const int64_t step = round_up((args_.next.bytes + products - 1) / products, 64);
      ahead_ = args_.next.data;
      ahead_step_ = step < kMostAhead ? step : kMostAhead;
      ahead_line_ = 64;
    }
  }

  // The rows of one tile: `skip` of them are already stored.
  struct Half {
    int64_t first, skip, rows;
  };

  void configure() const {
    TileConfig config;
    for (int i : {0, 1, 2, 3, 4, 5}) config.rows[i] = static_cast<uint8_t>(stretches_.height);
    for (int i : {4, 5}) config.row_bytes[i] = static_cast<uint16_t>(step_bytes_);
    for (int i : {6, 7}) config.rows[i] = static_cast<uint8_t>(step_bytes_ / 4);
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }

  void find_half(int64_t tile, int64_t half) {
    const int64_t height = stretches_.height;
    const int64_t begin = tile % stretches_.tiles * height;
    const int64_t over = begin + height - stretches_.length;
    const int64_t skip = over > 0 ? over : 0;
    const int64_t stretch = block_.row_begin + tile / stretches_.tiles * stretches_.length;
    halves_[half] = {stretch + begin - skip, skip, height - skip};
  }

  // Where the taps of row 0 of a half lie: pointers and an offset to be added.
  const uint8_t* const* taps_of(int64_t row, int64_t* offset) const {
    *offset = row % args_.run * args_.a_row_stride;
    return args_.pointers + row / args_.run * header_.taps;
  }

  void find_rows(int64_t half) {
    const int64_t first = halves_[half].first;
    if (!in_place_) {
      copy_rows(half);
    } else if (args_.pointers == nullptr) {
      a_[0][half] = args_.a + first * args_.a_row_stride;
    } else {
      int64_t offset;
      const uint8_t* const* taps = taps_of(first, &offset);
      for (int64_t tap = 0; tap < header_.taps; ++tap) a_[tap][half] = taps[tap] + offset;
    }
    a_stride_ = in_place_ ? args_.a_row_stride : joined_stride(header_);
  }

  void copy_rows(int64_t half) {
    const int64_t stride = joined_stride(header_);
    uint8_t* dst = buffer_ + half * kTileRows * stride;
    a_[0][half] = dst;
    for (int64_t i = 0; i < stretches_.height; ++i, dst += stride) {
      const int64_t row = halves_[half].first + i;
      if (args_.pointers == nullptr) {
        const uint8_t* const a = args_.a + row * args_.a_row_stride;
        copier_.row(&a, 0, dst, row_bytes_);
      } else {
        int64_t offset;
        const uint8_t* const* taps = taps_of(row, &offset);
        copier_.row(taps, offset, dst, row_bytes_);
      }
    }
  }

  uint32_t row_sum(int64_t row) const {
    if (args_.pointers == nullptr) {
      const uint8_t* const a = args_.a + row * args_.a_row_stride;
      return igemm_row_sum(&a, 0, header_);
    }
    int64_t offset;
    const uint8_t* const* taps = taps_of(row, &offset);
    return igemm_row_sum(taps, offset, header_);
  }

  template <int R>
  void all_panels(const Places& places) {
    for (int64_t panel = block_.panel_begin; panel < block_.panel_end; ++panel) {
      const int64_t column = panel * 64, rest = header_.n - column;
      const int64_t vectors = ((rest < 64 ? rest : 64) + 15) / 16;
      const Pending now{&places, sums_[next_], column, vectors};
      with_finish([&](auto finish) { this->one_panel<R, typename decltype(finish)::Type>(now); });
      pending_ = now;
      next_ ^= 1;
    }
  }

  // The products of `now` beside the epilogue of pending_.
  template <int R, class Finish>
  __attribute__((noinline)) void one_panel(const Pending& now) {
    Finish finish(pending_, context_);
    const int64_t between = 2 * segments_ * steps_ * ((now.vectors + 1) / 2);
    const int64_t share = (pending_.rows() + between - 1) / between;
    const int64_t early = share * Finish::kCost > kMostBetween ? 0 : share;
    const int64_t late = 2 * share - early;
    const int8_t* const b = args_.matrix.panels + now.column / 64 * header_.panel_bytes;
    for (int64_t j = 0; j < now.vectors; j += 2) {
      if (now.vectors - j >= 2) {
        multiply<R, 2>(b + 64 * j, now, j, early, late, finish);
      } else {
        multiply<R, 1>(b + 64 * j, now, j, early, late, finish);
      }
    }
    finish.run(kPairRows);
  }

  template <class Finish>
  __attribute__((noinline)) void rest() {
    Finish(pending_, context_).run(kPairRows);
  }

  template <class T>
  struct Tag {
    using Type = T;
  };

  // Calls `use` with the type of the epilogue of pending_.
  template <class Use>
  void with_finish(Use use) const {
    if (!header_.stores_plain_bytes()) {
      use(Tag<FinishAny>());
    } else if (pending_.vectors > 2) {
      with_bytes<4>(use);
    } else if (pending_.vectors == 2) {
      with_bytes<2>(use);
    } else {
      with_bytes<1>(use);
    }
  }

  template <int V, class Use>
  void with_bytes(Use use) const {
    if (!header_.epilogue.has_residual) {
      use(Tag<FinishBytes<V, Residual::kNone>>());
    } else if (args_.residual_signed) {
      use(Tag<FinishBytes<V, Residual::kS8>>());
    } else {
      use(Tag<FinishBytes<V, Residual::kU8>>());
    }
  }

  // Sums = a * b, for R tiles of rows and C * 16 columns from vector j on, R and C in {1, 2}, plus
  // init where `finish` does not add it; between the products `early` rows are finished, behind
  // them `late`.
  template <int R, int C, class Finish>
  inline __attribute__((always_inline)) void multiply(const int8_t* b, const Pending& now,
                                                      int64_t j, int64_t early, int64_t late,
                                                      Finish& finish) {
    const int64_t a_stride = a_stride_, b_stride = 64 * now.vectors;
    const int64_t step_bytes = step_bytes_, b_step = step_bytes / 4 * b_stride;
    if (header_.stores_plain_bytes()) {
      start_at_zero();
    } else {
      start_at<R, C>(args_.matrix.init + now.column + 16 * j);
    }
    for (int64_t segment = 0; segment < segments_; ++segment) {
      const uint8_t* upper = a_[segment][0];
      const uint8_t* lower = a_[segment][1];
      for (int64_t step = 0; step < steps_; ++step) {
        QK_LOAD_TILE("(%0,%1,1), %%tmm4", upper, a_stride);
        if (R == 2) QK_LOAD_TILE("(%0,%1,1), %%tmm5", lower, a_stride);
        QK_LOAD_TILE("(%0,%1,1), %%tmm6", b, b_stride);
        if (C == 2) QK_LOAD_TILE("64(%0,%1,1), %%tmm7", b, b_stride);
        QK_MULTIPLY_TILES("%%tmm6, %%tmm4, %%tmm0");
        if (R == 2) QK_MULTIPLY_TILES("%%tmm6, %%tmm5, %%tmm2");
        finish.run(early);
        if (C == 2) QK_MULTIPLY_TILES("%%tmm7, %%tmm4, %%tmm1");
        if (R == 2 && C == 2) QK_MULTIPLY_TILES("%%tmm7, %%tmm5, %%tmm3");
        upper += step_bytes;
        lower += step_bytes;
        b += b_step;
        finish.run(late);
        fetch_ahead();
      }
    }
    store<R, C>(now.sums + 16 * j);
  }

  static void start_at_zero() {
    __asm__ volatile("tilezero %tmm0");
    __asm__ volatile("tilezero %tmm1");
    __asm__ volatile("tilezero %tmm2");
    __asm__ volatile("tilezero %tmm3");
  }

  // All rows of a tile are the same 16 sums.
  template <int R, int C>
  static void start_at(const int32_t* init) {
    const int64_t stride = 0;
    QK_LOAD_TILE("(%0,%1,1), %%tmm0", init, stride);
    if (R == 2) QK_LOAD_TILE("(%0,%1,1), %%tmm2", init, stride);
    if (C == 2) QK_LOAD_TILE("64(%0,%1,1), %%tmm1", init, stride);
    if (R == 2 && C == 2) QK_LOAD_TILE("64(%0,%1,1), %%tmm3", init, stride);
  }

  // The lower tile first: the rows that it repeats are overwritten with the same sums.
  template <int R, int C>
  inline __attribute__((always_inline)) void store(int32_t* c) const {
    const int64_t stride = 256;
    if (R == 2) {
      int32_t* const half = c + (stretches_.height - halves_[1].skip) * 64;
      QK_STORE_TILE("%%tmm2, (%0,%1,1)", half, stride);
      if (C == 2) QK_STORE_TILE("%%tmm3, 64(%0,%1,1)", half, stride);
    }
    QK_STORE_TILE("%%tmm0, (%0,%1,1)", c, stride);
    if (C == 2) QK_STORE_TILE("%%tmm1, 64(%0,%1,1)", c, stride);
  }

  // A step's share of the weights that the next call reads, on their way to L2.
  inline __attribute__((always_inline)) void fetch_ahead() {
    for (const int8_t* end = ahead_ + ahead_step_; ahead_ < end; ahead_ += ahead_line_) {
      _mm_prefetch(ahead_, _MM_HINT_T1);
    }
  }

  // The stored rows follow each other, from half to half; of each run_pitch rows only the first
  // run_width are outputs.
  void find_places(int64_t stored, Places& places) const {
    const int64_t first = halves_[0].first + halves_[0].skip;
    if (args_.run_pitch == 0) {
      fill(places.sums, halves_[0].skip, 1);
      places.rows = stored;
      find_outputs(first, places);
    } else {
      const int64_t width = args_.run_width, pitch = args_.run_pitch, phase = first % pitch;
      places.rows = 0;
      for (int64_t i = 0, x = phase; i < stored; ++i) {
        if (x < width) places.sums[places.rows++] = halves_[0].skip + i;
        if (++x == pitch) x = 0;
      }
      find_outputs(first / pitch * width + (phase < width ? phase : width), places);
    }
    if (args_.matrix.weight_zero_point != nullptr) {
      for (int64_t i = 0; i < places.rows; ++i) {
        places.row_sums[i] = row_sum(halves_[0].first + places.sums[i]);
      }
    }
  }

  // to[i] = from + i * step, numbers or addresses.
  template <class T>
  static void fill(T (&to)[kPairRows], int64_t from, int64_t step) {
    __m512i now = _mm512_add_epi64(
        _mm512_set1_epi64(from),
        _mm512_mullo_epi64(_mm512_set1_epi64(step), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)));
    for (int64_t i = 0; i < kPairRows; i += 8) {
      _mm512_storeu_si512(to + i, now);
      now = _mm512_add_epi64(now, _mm512_set1_epi64(8 * step));
    }
  }

  // Of the outputs from row `first` on.
  void find_outputs(int64_t first, Places& places) const {
    auto* const out = static_cast<uint8_t*>(args_.out);
    if (args_.out_row_offset != nullptr) {
      for (int64_t i = 0; i < places.rows; ++i) {
        places.out[i] = out + args_.out_row_offset[first + i];
      }
    } else {
      fill(places.out, reinterpret_cast<int64_t>(out) + first * args_.out_row_stride,
           args_.out_row_stride);
    }
    if (args_.residual == nullptr) return;
    if (args_.residual_row_offset != nullptr) {
      for (int64_t i = 0; i < places.rows; ++i) {
        places.residual[i] = args_.residual + args_.residual_row_offset[first + i];
      }
    } else {
      fill(places.residual,
           reinterpret_cast<int64_t>(args_.residual) + first * args_.residual_row_stride,
           args_.residual_row_stride);
    }
  }

  const IgemmBlock& block_;
  const IgemmArgs& args_;
  const PackedHeader& header_;
  const RowCopier copier_;
  uint8_t* const buffer_;
  const bool in_place_;
  const int64_t row_bytes_;
  const int64_t rows_;
  const Stretches stretches_;
  const FinishContext context_;
  int64_t segments_ = 1, steps_, step_bytes_ = kTileBytes;
  Half halves_[2] = {};
  const uint8_t* a_[kMaxTileTaps][2] = {};
  int64_t a_stride_ = 0;
  const int8_t* ahead_ = nullptr;
  int64_t ahead_step_ = 0, ahead_line_ = 64;
  int next_ = 0;
  Pending pending_;
  Places places_[2];
  alignas(64) int32_t sums_[2][kPairRows * 64];
};

// Rows with pointers of their own, for AVX512-VNNI.
void expand_runs(const IgemmBlock& block) {
  const IgemmArgs& args = block.args;
  const int64_t taps = args.matrix.header->taps;
  const uint8_t* pointers[kMaxTileTaps * kMaxBlockRows];
  for (int64_t row = block.row_begin; row < block.row_end; row += kMaxBlockRows) {
    const int64_t left = block.row_end - row, count = left < kMaxBlockRows ? left : kMaxBlockRows;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* const* from = args.pointers + (row + i) / args.run * taps;
      const int64_t offset = (row + i) % args.run * args.a_row_stride;
      for (int64_t tap = 0; tap < taps; ++tap) pointers[i * taps + tap] = from[tap] + offset;
    }
    IgemmArgs part = args;
    part.pointers = pointers;
    part.run = 1;
    part.out = static_cast<uint8_t*>(args.out) + row * args.out_row_stride;
    if (args.residual != nullptr) part.residual = args.residual + row * args.residual_row_stride;
    igemm_avx512vnni({part, 0, count, block.panel_begin, block.panel_end, block.lookup});
  }
}

__attribute__((noinline)) void run_rows(const IgemmBlock& block, bool in_place, uint8_t* buffer) {
  AmxRows(block, in_place, buffer).run();
}

// The buffer is as large as the rows of a pair of tiles, and in a frame of its own: a thread may
// have a small stack, and rows that are read where they lie need none of it.
__attribute__((noinline)) void run_copied(const IgemmBlock& block) {
  const int64_t rows = block.row_end - block.row_begin;
  const int64_t held = rows > kTileRows ? kPairRows : rows;
  const int64_t bytes = held * joined_stride(*block.args.matrix.header);
  run_rows(block, false, static_cast<uint8_t*>(__builtin_alloca_with_align(bytes, 8 * 64)));
}

}  // namespace

void igemm_amx(const IgemmBlock& block) {
  const IgemmArgs& args = block.args;
  const PackedHeader& header = *args.matrix.header;
  const int64_t rows = block.row_end - block.row_begin;
  const bool even = args.pointers == nullptr || args.run >= kMinStretch;
  const bool in_place =
      even && !header.input_signed && tile_step(header.depth) > 0 && header.taps <= kMaxTileTaps;
  const int64_t columns = header.n - 64 * block.panel_begin;
  const bool worth_copies =
      joined_bytes(header) * (columns < 64 ? columns : 64) >= kMinCopiedWeights &&
      kPairRows * joined_stride(header) <= kMostCopied;
  if (rows < kMinTileRows || !(in_place || worth_copies) ||
      !fills_tiles(columns, header.taps, header.depth)) {
    args.run > 1 ? expand_runs(block) : igemm_avx512vnni(block);
    return;
  }
  in_place ? run_rows(block, true, nullptr) : run_copied(block);
}

}  // namespace qk
QK_TARGET_END
