// Binary networks: signs in training, and products of packed signs.
//
//   sign      y = x >= 0 ? 1 : -1 (NaN: -1)
//   backward  out = |x| <= 1 || (is_weight && x * grad > 0) ? grad : 0
//   pack      bit k % 64 of word k / 64 of a row: x[k] >= 0; the bits beyond the row are 0
//   conv      out = float(sum over taps inside the image and channels of sign(a) * sign(w)) *
//   scale[o]
//             + bias[o]; padded taps contribute 0
//
// Layout: sign works on dense memory. Packed activations are [image][row][column][word of
// channels]; packed weights are blocks of kBinaryBlock output channels, [block][tap][word][channel
// of the block]. out is [image][row][column][output channel]. A linear layer is an image of M x 1
// pixels. Memory: owned by the caller. Numbers: sums are exact; the float operations are two
// roundings, no fma. Trick: the sum over n channels is n - 2 * popcount(a xor w): bits beyond the
// row are 0 in both. A word of activations meets the words of 32 output channels, so that nothing
// is added across lanes.
#pragma once

#include <cstdint>

#include "csrc/base/cpu.h"
#include "csrc/base/dtype.h"
#include "csrc/base/parallel.h"

namespace qk {

struct SignArgs {
  const void* x;
  void* y;
  FloatType type;
  int64_t n;
};
void binary_sign(const SignArgs& args, const Parallel& parallel);

struct SignBackwardArgs {
  const void* grad;
  const void* x;
  void* out;
  FloatType type;
  int64_t n;
  bool is_weight;
};
void binary_sign_backward(const SignBackwardArgs& args, const Parallel& parallel);

inline constexpr int64_t kBinaryBlock = 32;
// The most segments of one output pixel: rows of a kernel without dilation along the row, else
// taps.
inline constexpr int64_t kBinarySegments = 128;
constexpr int64_t binary_words(int64_t n) { return (n + 63) / 64; }
constexpr int64_t binary_blocks(int64_t n) { return (n + kBinaryBlock - 1) / kBinaryBlock; }

// Element (row, k) of x is at row / inner * outer_stride + row % inner * inner_stride + k * stride.
struct BinaryPackArgs {
  const void* x;
  FloatType type;
  int64_t rows, n;
  int64_t inner, outer_stride, inner_stride, stride;
  uint64_t* out;  // [rows][binary_words(n)]
};
void binary_pack(const BinaryPackArgs& args, const Parallel& parallel);

// From packed rows [output channel][tap][word].
void binary_pack_weight(const uint64_t* rows, int64_t channels, int64_t words, uint64_t* out);

struct BinaryConvArgs {
  const uint64_t* input;   // [images][size[0]][size[1]][words]
  const uint64_t* weight;  // binary_pack_weight
  const float* scale;      // [out_channels]
  const float* bias;       // or null
  float* out;              // [images][out_size[0]][out_size[1]][out_channels]
  int64_t images, in_channels, out_channels;
  int64_t size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];
};
void binary_conv(const BinaryConvArgs& args, const Parallel& parallel);

// `words` words of a pixel's taps, which meet the words from `first` on of each block of weights.
struct BinarySegment {
  const uint64_t* input;
  int64_t first;
  int64_t words;
};

// ones[c] = popcount of input xor weight over all segments; weight is one block.
using SignProductKernel = void (*)(const BinarySegment* segments, int64_t count,
                                   const uint64_t* weight, int32_t ones[kBinaryBlock]);

#define QK_SIGN_PRODUCT_KERNEL(features, name) \
  void name(const BinarySegment*, int64_t, const uint64_t*, int32_t*);
#include "csrc/binary/kernels.inc"
#undef QK_SIGN_PRODUCT_KERNEL

SignProductKernel select_sign_product_kernel(CpuFeatures features = cpu_features_active());

}  // namespace qk
