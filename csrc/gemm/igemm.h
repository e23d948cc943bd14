// Integer GEMM with prepacked weights, the core of linear and of convolution.
//
//   acc[r, n] = sum over tap, k of (a[r, tap, k] - za) * (w[n, tap, k] - zw[n])      exact int32
//   out[r, n] = epilogue(acc[r, n])                                                  see epilogue.h
//
// Layout: the weights are packed in panels of `nr` columns, [N/nr][taps][depth/4][nr][4] (depth
//   padded with zero weights to a multiple of 4, see overlaps_tail(); the last panel only as wide
//   as whole vectors need), so that one dot-product instruction reads one vector of B and four
//   broadcast bytes of A. AVX2 has no dot product of bytes that is exact for all: its weights are
//   steps of four columns (byte_steps.h), in which vpmaddubsw is, or else panels of int32 [nr], at
//   which the sums start, and then pairs for vpmaddwd, [taps * depth / 2][nr][2], to a multiple of
//   4 deep.
//   Rows of A are read where they lie: `a + row * a_row_stride` (taps == 1), or through
//   `pointers[row * taps + tap]`, each pointing at `depth` readable bytes (AVX2 copies the rows of
//   a block first). No byte past `depth` is read and no byte past column n is written.
// Memory: the caller owns everything; packed bytes are 64-byte aligned.
// Numbers: the same bits on every ISA. int8 activations are flipped to uint8 (xor 0x80, zero point
//   + 128) inside the kernel. Activation zero points are in init[n]; weight zero points cost one
//   row sum.
// Trick: a register tile (6x64 and less) for the whole of K, so no int32 buffer, no packing of
//   A (but on AVX2, which has no exact dot product of bytes); B streams from L2.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/base/cpu.h"
#include "csrc/base/status.h"
#include "csrc/gemm/epilogue.h"
#include "csrc/pointwise/pointwise.h"

namespace qk {

inline constexpr uint64_t kPackedMagic = 0x4d4d454749'4b51ull;  // "QKIGEMM"
inline constexpr uint32_t kPackedVersion = 4;
inline constexpr int64_t kPackedAlign = 64;
// The last tile of the last panel may be read to its end: 15 quads of 64 columns too far.
inline constexpr int64_t kAmxTailBytes = 15 * 256;

// At the start of the packed bytes. Offsets are in bytes from the header.
struct alignas(64) PackedHeader {
  uint64_t magic;
  uint32_t version;
  Isa isa;
  int64_t bytes;  // of the whole packed matrix
  int64_t n, taps, depth;
  int64_t panel_bytes;  // of a full panel; with orders about that
  int64_t panels_offset, init_offset, zero_point_offset, addend_offset, mult_offset;
  int32_t input_signed;
  int32_t has_weight_zero_point;
  int32_t wide;    // a value may leave the int32 range before it is clamped
  int32_t orders;  // of byte_steps.h; 0: pairs, or another ISA
  Epilogue epilogue;

  // 8-bit outputs that need neither weight zero points nor a wide clamp.
  bool packs_bytes() const { return epilogue.is_8bit() && !wide && !has_weight_zero_point; }
  // And no table.
  bool stores_plain_bytes() const { return packs_bytes() && !epilogue.has_table; }
};

// What AMX reads in place: at most so many taps, cut into equal steps of whole quads, the bytes of
// a tile or fewer, but no more than twice as many steps as full tiles would take. 0: no such step.
inline constexpr int64_t kMaxTileTaps = 64, kTileDepth = 64;
inline constexpr int64_t tile_step(int64_t depth) {
  const int64_t least = (depth + kTileDepth - 1) / kTileDepth;
  for (int64_t steps = least; steps > 0 && steps < 2 * least; ++steps) {
    if (depth % (4 * steps) == 0) return depth / steps;
  }
  return 0;
}
// The least depth from `depth` on that has a step.
inline constexpr int64_t tile_depth(int64_t depth) {
  const int64_t quantum = (depth + kTileDepth - 1) / kTileDepth * 4;
  return (depth + quantum - 1) / quantum * quantum;
}
// With fewer rows or fewer weights in a panel a tile is mostly empty, and its store costs more than
// the sums: measured break-even against AVX512-VNNI.
inline constexpr int64_t kMinTileRows = 5, kMinPanelWeights = 128;
inline constexpr bool fills_tiles(int64_t columns, int64_t taps, int64_t depth) {
  const int64_t width = columns < 64 ? (columns + 15) / 16 * 16 : 64;
  return taps * ((depth + 3) / 4 * 4) * width >= kMinPanelWeights;
}

// The most taps * depth of a packed matrix, idle weights included (PackSource): AVX2 keeps a row of
// A on its stack, and numbers its quads in 16 bits.
inline constexpr int64_t kMaxColumn = kMaxKS8S8;

// A checked view of packed bytes.
struct PackedMatrix {
  const PackedHeader* header = nullptr;
  const int8_t* panels = nullptr;
  const int32_t* init = nullptr;               // -za * colsum + taps * depth * za * zw
  const int32_t* weight_zero_point = nullptr;  // nullptr: all zero
  const float* addend = nullptr;
  const float* mult = nullptr;
};

// Columns in a panel and in a vector of an ISA's layout. The last panel is as wide as its vectors.
struct PanelShape {
  int64_t columns, lanes;
};
inline constexpr PanelShape panel_shape(Isa isa) {
  return isa >= Isa::kAvx512Vnni ? PanelShape{64, 16} : PanelShape{16, 8};
}
// Whether the last quad of a depth that is no multiple of 4 is read with the three bytes before it,
// which meet zero weights there: one load, nothing beyond the row. Elsewhere it is padded with
// zeros.
inline constexpr bool overlaps_tail(Isa isa, int64_t depth) {
  return depth > 4 && depth % 4 != 0 && (isa == Isa::kAvxVnni || isa == Isa::kAvx512Vnni);
}
inline constexpr int64_t panel_count(int64_t n, Isa isa) {
  return (n + panel_shape(isa).columns - 1) / panel_shape(isa).columns;
}

// A canonical weight and the grids around it.
struct PackSource {
  const int8_t* weight;  // element (n, tap, k) at weight[n*stride_n + tap*stride_tap + k*stride_k]
  int64_t n, taps, depth;
  int64_t stride_n, stride_tap, stride_k;
  const float* weight_scale;         // [n] or, if per_tensor, [1]
  const int32_t* weight_zero_point;  // like weight_scale; nullptr: zero
  bool per_tensor;
  const float* bias;  // [n] or nullptr
  float input_scale;
  int32_t input_zero_point;
  bool input_signed;
  float output_scale;  // of an 8-bit output
  Epilogue epilogue;
  bool few_rows = false;  // A will have about as many rows as a batch has images
  // Weights of a column that only its layout has: they hold its zero point, and count as zero.
  int64_t idle = 0;

  // Of a column: its K.
  int64_t products() const { return taps * depth - idle; }
};

int64_t packed_igemm_bytes(int64_t n, int64_t taps, int64_t depth, Isa isa);
// kKTooLarge if the accumulator of source.products() products could overflow int32. Reads no
// weight.
Status check_accumulator(const PackSource& source);
// Whether `out` may be the residual itself: the wide stores of bytes read the residual of a row
// before they write it; other stores add to what they have stored.
bool igemm_adds_in_place(const PackedHeader& header);
// Writes packed_igemm_bytes(...) bytes at dst (64-byte aligned); taps * depth is kMaxColumn at
// most. kKTooLarge: the accumulator could overflow int32. kBadScale: see in_range().
Status pack_igemm(const PackSource& source, Isa isa, void* dst);
// What a column adds around its products, arrays over n.
struct ColumnTerms {
  int32_t* init;  // -za * colsum + taps * depth * za * zw
  int32_t* weight_zero_point;
  float *addend, *mult;
};
struct FoldedColumn {
  int32_t init;
  float addend, mult;
};
// What docs/numerics.md asks of a column, `scale` being that of its products.
inline bool in_range(float scale, const FoldedColumn& column) {
  return std::isnormal(scale) && std::isnormal(column.mult) && std::isfinite(column.addend);
}
// `sum`: of the `count` weights of the column; `scale`: of its products; bias null: none. Modulo
// 2^32, as all of the kernels' int32 arithmetic: only the true accumulator must fit.
QK_HD FoldedColumn folded(int64_t sum, int64_t count, int64_t za, int64_t zw, float scale,
                          const float* bias, bool is_8bit, float output_scale) {
  return {static_cast<int32_t>(static_cast<uint32_t>(-za * sum + count * za * zw)),
          bias == nullptr ? 0.0f : *bias / scale, is_8bit ? scale / output_scale : scale};
}
// Fills in column n for the input zero point `za` that the kernel sees.
Status fold_column(const PackSource& source, int64_t n, int64_t za, const ColumnTerms& terms);
// Checks magic, version, isa against the active one, alignment and sizes.
Status view_packed(const void* bytes, int64_t size, PackedMatrix* matrix);

// Weights that the next call reads, on their way to L2 meanwhile. A hint: AVX512-VNNI and AMX take
// it.
struct NextWeights {
  const int8_t* data = nullptr;
  int64_t bytes = 0;
};

// Rows [row_begin, row_end) x panels [panel_begin, panel_end), on one thread.
struct IgemmArgs {
  PackedMatrix matrix;
  const uint8_t* a = nullptr;
  int64_t a_row_stride = 0;
  const uint8_t* const* pointers = nullptr;  // wins over `a`
  // Rows that share the pointers of their first: `a_row_stride` further on for each. AMX and
  // AVX512-VNNI only; row_begin, row_end are multiples of it then.
  int64_t run = 1;
  // If not 0: of each run_pitch rows only the first run_width are outputs, and the rows of `out`
  // are those. AMX only; `run` is a multiple of run_pitch; for runs that tiles read in place, dense
  // output.
  int64_t run_width = 0, run_pitch = 0;
  int64_t row_begin = 0, row_end = 0;
  int64_t panel_begin = 0, panel_end = 0;
  void* out = nullptr;
  int64_t out_row_stride = 0;  // bytes
  // Bytes, one a row, ascending or descending, outputs apart: wins over out_row_stride.
  const int64_t* out_row_offset = nullptr;
  const uint8_t* residual = nullptr;
  int64_t residual_row_stride = 0;
  const int64_t* residual_row_offset = nullptr;
  bool residual_signed = false;
  NextWeights next;
};

void igemm(const IgemmArgs& args);
// The block of weights that a call on all columns reads first.
NextWeights first_weights(const PackedMatrix& matrix);

struct IgemmBlock {
  const IgemmArgs& args;
  int64_t row_begin, row_end, panel_begin, panel_end;
  LookupKernel lookup;  // with a table
};
using IgemmKernel = void (*)(const IgemmBlock& block);

#define QK_IGEMM_KERNEL(features, isa, name) void name(const IgemmBlock&);
#include "csrc/gemm/kernels.inc"
#undef QK_IGEMM_KERNEL

// The kernel that reads the layout of `isa`.
IgemmKernel select_igemm_kernel(Isa isa);

}  // namespace qk
