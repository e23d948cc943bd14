// Depthwise convolution and narrow groups: convolutions with too few channels a group for a GEMM.
//
//   depthwise  groups == in_channels, any channel multiplier m: output o reads channel o / m
//   narrow     4, 8, 12 or 16 channels in, as many or more (at most 16, a power of two) out
//   acc[o, y, x] = sum over rows r, columns k and the channels c of the group of o of
//                    (x[c, r, k] - za) * w[o, c, r, k]
//
// Layout: channels innermost. The output is computed in strips: `rows_out` (1 or 2) output rows x
//   some columns x a block of up to `channels` channels.
// Memory: the weight part is packed by pack_depthwise; the workspace is the caller's.
// Numbers: exact int32, the same bits on every ISA. Weight zero points are not supported here (the
//   driver takes the GEMM path for them).
// Trick: the input of a strip is first written to a scratch strip as dwords, one a lane of output
//   channels. Depthwise: a dword is four rows of one channel (rows interleaved byte by byte; AVX2:
//   two rows as int16), so one dot-product instruction does four rows of 16 channels, and the strip
//   serves all horizontal taps and both output rows: the second row uses the same dwords with the
//   weights moved down.
//   Narrow groups: a dword is four channels of the lane's group (one permutation), so all lanes of
//   the dot product work, which a GEMM of one group cannot reach. Interleaving permutes the
//   channels of a block; the packed parameters are permuted the same way, and the narrowing packs
//   of the epilogue undo it for free. Where output rows lie one below the other (three taps, no
//   stride or dilation), a strip of narrow groups goes down the image: it keeps the input rows that
//   the next output row reads, too.
#pragma once

#include "csrc/base/parallel.h"
#include "csrc/conv/conv.h"

namespace qk {

// How a phase is cut.
struct DepthwisePlan {
  int64_t quads;       // of channels in a narrow group; 0: depthwise
  int64_t rows_out;    // output rows that share a scratch strip
  int64_t window;      // input rows of one depth tap under them
  int64_t rows;        // input rows: depth taps * window, depthwise rounded up to whole dwords
  int64_t row_groups;  // dwords a lane: rows / 4 (AVX2: 2), or rows * quads
  int64_t columns;     // horizontal taps
};

// One strip of one channel block.
struct DepthwiseStrip {
  const uint8_t* const* rows;    // [plan.rows], at the block's first channel
  const int64_t* column_offset;  // [strip_columns] bytes from rows[i]; -1: padding
  int64_t strip_columns;
  int64_t quads, window, input_rows;  // of the plan
  int64_t in_group, out_group;        // channels; depthwise: 1 and the multiplier
  int64_t channel_phase;              // first output channel of the block % out_group
  int64_t channels;                   // output channels of the block
  int64_t vectors;
  uint8_t padding;     // the input's zero point
  uint8_t input_flip;  // 0x80 for int8 input
  // Input rows [0, known_rows) are in the scratch already, row i in the place of (turn + i) %
  // input_rows: those that the output row above has read, too.
  uint8_t known_rows, turn;
  int64_t row_groups, taps, tap_step, column_step;  // steps in strip columns
  int64_t rows_out;
  const int8_t* weights;  // [taps][row_groups][vectors][rows_out][vector]
  const int32_t* init;    // [vectors * lanes], like addend and mult, which follow it
  const float* addend;
  const float* mult;
  const int32_t* order;  // narrow groups: [quads][vectors][lanes] dword of the block's input
  int16_t zero_point;    // of the output as uint8
  uint8_t qmin, qmax;    // of the output as uint8
  uint8_t output_flip;
  int64_t outputs;  // columns of output
  uint8_t* out[2];
  int64_t out_step;  // bytes between columns of output
  int32_t* acc;      // if not nullptr: accumulators [outputs][rows_out][vectors * lanes] instead
  uint8_t* scratch;  // strip_columns * layout.column_bytes(plan), 64-byte aligned
};
using DepthwiseKernel = void (*)(const DepthwiseStrip& strip);

#define QK_DEPTHWISE_KERNEL(features, isa, name) void name(const DepthwiseStrip&);
#define QK_WINOGRAD_KERNEL(features, isa, name)
#include "csrc/conv/kernels.inc"
#undef QK_DEPTHWISE_KERNEL
#undef QK_WINOGRAD_KERNEL

DepthwiseKernel select_depthwise_kernel(Isa isa);

// Whether the depthwise kernels compute this convolution.
bool is_depthwise(const ConvSource& source);
// The shape with the taps along H that a 1-D convolution has along W: rows are what the kernels
// share.
ConvShape depthwise_shape(const ConvShape& shape);
ConvExtent depthwise_extent(const ConvShape& shape, const ConvExtent& extent);

int64_t packed_depthwise_bytes(const ConvShape& shape, const ConvPhase& phase, Isa isa);
Status pack_depthwise(const ConvSource& source, const ConvPhase& phase, Isa isa, uint8_t* dst);

int64_t depthwise_workspace_bytes(const ConvArgs& args, const Parallel& parallel);
void depthwise(const ConvArgs& args, const Parallel& parallel);

}  // namespace qk
