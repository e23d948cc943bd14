// Integer convolution: 1-D, 2-D, 3-D, ordinary and transposed, grouped and depthwise.
//
//   acc[n, o, y] = sum over taps k and channels c of the group of o of
//                    (x[n, c, source(y, k)] - za) * (w[o, c, k] - zw[o])        exact int32
//   out = epilogue(acc)                                                         see gemm/epilogue.h
//   A padded position contributes zero: its byte is the input's zero point.
//
// Layout: input and output are dense N, D, H, W, C (channels innermost), in many cases slices of
//   the channels of wider tensors; the input may be floats (csrc/image/image.h) where it is copied
//   anyway, the output dequantized codes. The canonical weight is torch's: [O, I/groups,
//   D, H, W], transposed [I, O/groups, D, H, W].
// Memory: the caller owns everything, the workspace included (conv_workspace_bytes).
// Numbers: the same bits on every ISA and for every thread count.
// Tricks: no im2col buffer. The GEMM kernel reads rows of A through pointers: one pointer for each
//   output pixel and kernel row, because a row of the window is contiguous in memory (only windows
//   that overhang the image are copied); one pointer for each tap where it is not (dilation,
//   groups). A 1x1 convolution is the GEMM itself. Depthwise convolutions have their own kernels
//   (depthwise.h). Narrow groups are merged until they fill a vector of outputs. 3x3 convolutions
//   of stride 1 have a second way with fewer products (winograd.h).
#pragma once

#include "csrc/base/parallel.h"
#include "csrc/conv/geometry.h"
#include "csrc/gemm/dequantized.h"
#include "csrc/image/image.h"

namespace qk {

inline constexpr uint64_t kPackedConvMagic = 0x564e4f43'4b51ull;  // "QKCONV"
inline constexpr uint32_t kPackedConvVersion = 3;

enum class ConvKind : int32_t { kIgemm = 0, kDepthwise = 1 };

// At the start of the packed bytes. `parts` is a table of offsets, from the header, of one packed
// matrix (or depthwise part) for each phase and each set of merged groups, then one for the outputs
// that no phase reaches.
struct alignas(64) PackedConvHeader {
  uint64_t magic;
  uint32_t version;
  Isa isa;
  int64_t bytes;
  ConvShape shape;
  ConvKind kind;
  int32_t input_zero_point;
  int32_t input_signed;
  int32_t has_fill;
  int64_t phases, sets, groups_per_set;
  int64_t parts_offset, parts;
  int64_t winograd_offset;  // of transformed weights, behind the parts; 0: none
  Epilogue epilogue;

  int64_t parts_end() const { return winograd_offset > 0 ? winograd_offset : bytes; }
};

struct ConvSource {
  ConvShape shape;
  const int8_t* weight;
  const float* weight_scale;         // [out_channels], or [1] if per_tensor
  const int32_t* weight_zero_point;  // like weight_scale; nullptr: zero
  bool per_tensor;
  const float* bias;  // [out_channels] or nullptr
  float input_scale;
  int32_t input_zero_point;
  bool input_signed;
  float output_scale;
  Epilogue epilogue;
  // Packed once and run often: what takes longer to pack may pay.
  bool keeps = true;
};

// Reads the weights: some have a second form. The header is written at dst (64-byte aligned,
// packed_conv_bytes long).
int64_t packed_conv_bytes(const ConvSource& source, Isa isa);
Status pack_conv(const ConvSource& source, Isa isa, void* dst);
// Checks magic, version, isa against the active one, sizes and every part.
Status view_packed_conv(const void* bytes, int64_t size, const PackedConvHeader** header);

struct ConvArgs {
  const PackedConvHeader* packed = nullptr;
  ConvExtent extent;
  const uint8_t* input = nullptr;
  // Elements from one input pixel to the next, like out_pixel_stride. Only where
  // conv_reads_slices().
  int64_t in_pixel_stride = 0;
  // Instead of the input, if floats.x: its codes before they are quantized. Only where
  // conv_pads_image().
  FloatImages floats;
  void* out = nullptr;
  // Elements from one output pixel to the next: the channels of a wider tensor, of which the output
  // is a slice; 0: dense. Only where conv_writes_slices().
  int64_t out_pixel_stride = 0;
  // If set, the output is float32: the dequantized codes. Only where conv_dequantizes().
  DequantizedOutput dequantized;
  const uint8_t* residual = nullptr;  // dense; see conv_adds_in_place
  bool residual_signed = false;
  void* workspace = nullptr;  // 64-byte aligned
  NextWeights next;
};

// Whether `out` may be the residual itself: each of its bytes is read before the output is stored.
bool conv_adds_in_place(const PackedConvHeader& packed);

// What a convolution reads of its weights on so many threads, in bytes, and what it reads first.
int64_t conv_weight_bytes(const ConvArgs& args, int64_t threads);
NextWeights conv_first_weights(const ConvArgs& args, int64_t threads);
// Whether the input may be a slice of the channels of a wider tensor, and the output.
bool conv_reads_slices(const PackedConvHeader& packed);
inline bool conv_writes_slices(const PackedConvHeader& packed) {
  return packed.kind == ConvKind::kIgemm;
}

inline bool conv_dequantizes(const PackedConvHeader& packed) {
  return packed.kind == ConvKind::kIgemm && !packed.has_fill && packed.epilogue.is_8bit();
}

// Whether the input is read once, row by row, into a padded copy.
bool conv_pads_image(const PackedConvHeader& packed);

int64_t conv_workspace_bytes(const ConvArgs& args, const Parallel& parallel);
void conv(const ConvArgs& args, const Parallel& parallel);

// Normative. Ignores args.packed and args.workspace.
void conv_reference(const ConvSource& source, const ConvArgs& args);

}  // namespace qk
