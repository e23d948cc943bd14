// The loops around a register tile, shared by the x86 kernels: row blocks, panels, row addresses.
// Include it inside the target region of a kernel file, inside its anonymous namespace, so that it
// is compiled for that target.
//
// A Kernel has kIsa, max_rows(header, vectors): the most rows of a tile that is `vectors` wide, and
//   void tile(int64_t rows, int64_t vectors, const IgemmTile&): all rows of a block, one panel;
//   and a type Copy, through which the rows of a block pass: InPlace, if they are read where they
//   lie.
// A block is as many tiles as keep its rows of A in L1, so that short rows pay for the loops once.

constexpr int64_t kMaxBlockRows = 96;
constexpr int64_t kBlockBytes = 24 * 1024;

struct IgemmTile {
  // Where Copy has left them: tap t of row i is at rows[i * row_pitch + t] + first_offset + i *
  // row_stride: row_pitch is `taps` and the others 0 where every row has its pointers; row_pitch is
  // 0 where they share those of a run.
  const uint8_t* const* rows = nullptr;
  int64_t row_pitch = 0, first_offset = 0, row_stride = 0;
  const PackedMatrix* matrix;
  const int8_t* panel = nullptr;
  int64_t first_column, columns;  // of this panel
  const uint32_t* row_sums;       // with weight zero points, else unset
  uint8_t* const* out;            // element (row, first_column)
  const uint8_t* const* residual;
  bool residual_signed;
  LookupKernel lookup;
  // From a byte of the panel to one that the next call reads, on its way to L2; 0: none. A tile
  // fetches one line of four, the next tile those that follow.
  int64_t ahead = 0;

  inline __attribute__((always_inline)) void fetch_next_lines() {
    if (ahead != 0) ahead = (ahead & ~int64_t{255}) + ((ahead + 64) & 255);
  }

  // On to the next rows of the block.
  inline __attribute__((always_inline)) void advance(int64_t count) {
    rows += count * row_pitch;
    first_offset += count * row_stride;
    row_sums += count;
    out += count;
    residual += count;
  }
};

// What is added to an 8-bit output before it is stored.
enum class Residual { kNone, kU8, kS8 };

struct InPlace {
  QK_INLINE int64_t row_bytes(const PackedHeader& header) { return header.taps * header.depth; }
  QK_INLINE int64_t rows_held(const PackedHeader&) { return kMaxBlockRows; }
  QK_INLINE void take(const PackedHeader&, int64_t, const uint8_t* const**, int64_t*) {}
};

// Sum of the bytes of the row `offset` bytes behind `taps`, as the kernel sees them (int8 flipped
// to uint8).
QK_INLINE uint32_t igemm_row_sum(const uint8_t* const* taps, int64_t offset,
                                 const PackedHeader& header) {
  const uint32_t flip = header.input_signed ? 0x80 : 0;
  uint32_t sum = 0;
  for (int64_t tap = 0; tap < header.taps; ++tap) {
    const uint8_t* a = taps[tap] + offset;
    for (int64_t k = 0; k < header.depth; ++k) sum += a[k] ^ flip;
  }
  return sum;
}

// Rows in tiles of nearly the same size: 8 rows are 4 + 4, not 6 + 2. The first `larger` tiles have
// one row more than the others.
struct EvenTiles {
  int64_t tiles, rows, larger;
};
QK_INLINE EvenTiles even_tiles(int64_t rows, int64_t most) {
  const int64_t tiles = (rows + most - 1) / most;
  return {tiles, rows / tiles, rows % tiles};
}

// How many of the `left` rows of `row_bytes` make the next block: all blocks have nearly the same
// number of tiles, full ones but in the last.
QK_INLINE int64_t block_rows(int64_t left, int64_t most, int64_t row_bytes) {
  const int64_t tiles = (left + most - 1) / most;
  int64_t fitting = row_bytes == 0 ? kMaxBlockRows : kBlockBytes / (row_bytes * most);
  if (fitting > kMaxBlockRows / most) fitting = kMaxBlockRows / most;
  if (fitting < 1) fitting = 1;
  if (fitting >= tiles) return left;
  const int64_t blocks = (tiles + fitting - 1) / fitting;
  return (tiles + blocks - 1) / blocks * most;
}

// The addresses of rows [row, row + count), `stride` apart or at their offsets.
template <typename Pointer>
QK_INLINE void spread_rows(Pointer base, const int64_t* offset, int64_t stride, int64_t row,
                           int64_t count, Pointer* rows) {
  if (offset != nullptr) {
    for (int64_t i = 0; i < count; ++i) rows[i] = base + offset[row + i];
  } else {
    base += row * stride;
    for (int64_t i = 0; i < count; ++i) rows[i] = base + i * stride;
  }
}

template <typename Kernel>
QK_INLINE void igemm_blocks(const IgemmBlock& block) {
  const IgemmArgs& args = block.args;
  const PackedHeader& header = *args.matrix.header;
  constexpr PanelShape shape = panel_shape(Kernel::kIsa);
  const Epilogue& epilogue = header.epilogue;
  const int64_t element = output_bytes(epilogue.output), rows = block.row_end - block.row_begin;
  if (rows <= 0 || block.panel_begin >= block.panel_end) return;

  const int64_t widest = header.n - block.panel_begin * shape.columns;
  const int64_t tile_rows =
      Kernel::max_rows(header, widest >= shape.columns ? shape.columns / shape.lanes
                                                       : (widest + shape.lanes - 1) / shape.lanes);

  const int64_t panels = block.panel_end - block.panel_begin;
  int64_t ahead = 0;
  if (block.panel_end < args.panel_end) {
    ahead = panels * header.panel_bytes;
  } else if (args.next.bytes > 0) {
    const int8_t* first = args.matrix.panels + block.panel_begin * header.panel_bytes;
    ahead = (args.next.data - first) & ~int64_t{255};
  }

  typename Kernel::Copy copy;
  const uint8_t* strided[kMaxBlockRows];
  const uint8_t* residual[kMaxBlockRows] = {};
  uint8_t* out[kMaxBlockRows];
  uint32_t row_sums[kMaxBlockRows];
  int64_t row = block.row_begin;
  while (row < block.row_end) {
    const int64_t in_run = args.run > 1 ? row % args.run : 0;
    const int64_t left = args.run > 1 ? args.run - in_run : block.row_end - row;
    const int64_t count = block_rows(left, tile_rows, Kernel::Copy::row_bytes(header));
    const uint8_t* const* sources = strided;
    int64_t row_pitch = header.taps, first_offset = 0, row_stride = 0;
    if (args.run > 1) {
      sources = args.pointers + row / args.run * header.taps;
      row_pitch = 0;
      row_stride = args.a_row_stride;
      first_offset = in_run * row_stride;
    } else if (args.pointers != nullptr) {
      sources = args.pointers + row * header.taps;
    } else if (Kernel::kIsa == Isa::kAvx512Vnni) {
      sources = &args.a;
      row_pitch = 0;
      row_stride = args.a_row_stride;
      first_offset = row * row_stride;
    } else {
      spread_rows(args.a, nullptr, args.a_row_stride, row, count, strided);
    }
    const int64_t first = block.panel_begin * shape.columns;
    spread_rows(static_cast<uint8_t*>(args.out) + first * element, args.out_row_offset,
                args.out_row_stride, row, count, out);
    if (epilogue.has_residual) {
      spread_rows(args.residual + first, args.residual_row_offset, args.residual_row_stride, row,
                  count, residual);
    }
    if (args.matrix.weight_zero_point != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        row_sums[i] = igemm_row_sum(sources + i * row_pitch, first_offset + i * row_stride, header);
      }
    }
    copy.take(header, count, &sources, &row_pitch);
    for (int64_t panel = block.panel_begin; panel < block.panel_end; ++panel) {
      const int64_t column = panel * shape.columns, rest = header.n - column;
      const int64_t columns = rest < shape.columns ? rest : shape.columns;
      const IgemmTile tile{sources,      row_pitch,
                           first_offset, row_stride,
                           &args.matrix, args.matrix.panels + panel * header.panel_bytes,
                           column,       columns,
                           row_sums,     out,
                           residual,     args.residual_signed,
                           block.lookup, ahead == 0 ? 0 : ahead + row / tile_rows % 4 * 64};
      Kernel::tile(count, (columns + shape.lanes - 1) / shape.lanes, tile);
      if (panel + 1 == block.panel_end) break;
      for (int64_t i = 0; i < count; ++i) out[i] += shape.columns * element;
      if (epilogue.has_residual) {
        for (int64_t i = 0; i < count; ++i) residual[i] += shape.columns;
      }
    }
    row += count;
  }
}
