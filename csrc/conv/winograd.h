// 3x3 convolutions of stride 1 with fewer products: Winograd's minimal filtering F(4x4, 3x3), in
// exact integers.
//
//   a tile of 4x4 outputs, per channel of the output, from the 6x6 pixels x under it:
//   y = A' [ sum over c of (G w[c] G') * (B' x[c] B) ] A     products element by element, 36 for
//   144
//       / 1 1  1 1  1 0 \       / 4  0 -5  0 1 0 \            /  6  0   0 \ .
//   A' =| 0 1 -1 2 -2 0 |  B' = | 0 -4 -4  1 1 0 |   24 G =   | -4 -4  -4 |   (row 5: 12 here, so
//       | 0 1  1 4  4 0 |       | 0  4 -4 -1 1 0 |            | -4  4  -4 |   that weights fit
//       \ 0 1 -1 8 -8 2 /       | 0 -2 -1  2 1 0 |            |  1  2   4 |   int16; A' has the
//                               | 0  2 -1 -2 1 0 |            |  1 -2   4 |   other factor of 2)
//                               \ 0  4  0 -5 0 1 /            \  0  0  12 /
//
// Layout: transformed pixels are int16 [36][tile][channels, rounded up to 32] (what lies behind the
//   last channel meets no weight, or weights that are zero); transformed weights
//   int16 [panel][36][pairs of channels][columns of the panel][2], the panels those of the GEMM
//   (gemm/igemm.h); sums int32 [tile][36][columns of a full panel].
// Memory: the weights are a part of the packed convolution; the workspace is the caller's.
// Numbers: exact, so the same bits as the direct kernels. Transformed pixels lie in [-12750, 17340]
//   (68 * 255), transformed weights, less their zero point, in 144 * 227 = 32688 (has_winograd
//   refuses more): both fit int16. Everything after that is arithmetic modulo 2^32, which gives
//   576 y; 576 = 9 * 64, 9 has an inverse and 64 is a shift, so y is exact if it fits 26 bits. That
//   depends on the weights alone, and is checked when they are packed.
// Trick: there is no rounding anywhere. Dot products of 16 bits do half the products of those of 8
//   in an instruction, but a quarter is left to do.
// Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015
//   (arXiv:1509.09308), the matrices for the points 0, 1, -1, 2, -2 and infinity.
#pragma once

#include "csrc/conv/conv.h"

namespace qk {

inline constexpr int64_t kWinogradTile = 4, kWinogradWindow = 6, kWinogradPoints = 36;
// Channels of a vector of transformed pixels.
inline constexpr int64_t kWinogradLanes = 32;

// A tile's place in the output: `height` x `width` of its pixels lie inside.
struct WinogradTile {
  uint8_t* out;
  const uint8_t* residual;  // or nullptr
  int64_t height, width;
};

// Some tiles, on one thread.
struct WinogradBlock {
  // Epilogue, init, addend and mult of the columns; its panels are not read.
  PackedMatrix matrix;
  const int16_t* weights;
  const uint8_t* const* pixels;  // [tiles][36], at the first channel
  const WinogradTile* tiles;
  int64_t count, channels;
  int64_t panel_begin, panel_end;
  int64_t out_row_stride, out_pixel_stride;            // bytes
  int64_t residual_row_stride, residual_pixel_stride;  // bytes
  bool residual_signed;
  LookupKernel lookup;  // with a table
  int16_t* transformed;
  int64_t point_stride;  // elements from a point of `transformed` to the next
  int32_t* sums;
  int16_t* scratch;  // 36 vectors
  NextWeights next;
};
using WinogradKernel = void (*)(const WinogradBlock& block);

#define QK_DEPTHWISE_KERNEL(features, isa, name)
#define QK_WINOGRAD_KERNEL(features, isa, name) void name(const WinogradBlock&);
#include "csrc/conv/kernels.inc"
#undef QK_DEPTHWISE_KERNEL
#undef QK_WINOGRAD_KERNEL

// nullptr if the ISA has none.
WinogradKernel select_winograd_kernel(Isa isa);

// Whether the ISA has a kernel for the shape, and the direct way no better one of its own: that
// reads some narrow inputs from a padded image, which may be floats.
bool winograd_shape(const ConvShape& shape, Isa isa);
// Whether transformed weights are kept beside the direct ones: the shape has them, they are worth
// their bytes, and the sums fit.
bool has_winograd(const ConvSource& source, Isa isa);
int64_t packed_winograd_bytes(const ConvShape& shape, Isa isa);
// dst is zero.
void pack_winograd(const ConvSource& source, Isa isa, int16_t* dst);

// Whether this call has transformed weights and is faster with them on so many threads.
bool uses_winograd(const ConvArgs& args, int64_t threads);
NextWeights winograd_first_weights(const ConvArgs& args);
int64_t winograd_workspace_bytes(const ConvArgs& args, const Parallel& parallel);
// Only with transformed weights, and not to dequantized codes.
void winograd(const ConvArgs& args, const Parallel& parallel);

}  // namespace qk
