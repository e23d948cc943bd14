// The weights of a convolution on CUDA: one part for each phase (see geometry.h), one after the
// other, each laid out as a GEMM's (gemm/cuda_pack.h) with one row an output channel.
//
// Layout: row [tap][depth]. Usually depth is the channels of a group and taps are all of the
//   phase's; where the channels do not fill chunks and a row of the window is contiguous in memory
//   (a "run", as for a 3-channel stem), depth is a whole row of the window. Depthwise: [tap][output
//   channel] instead of rows. The length ends as a GEMM's, its fingerprint being of the geometry
//   too.
// Memory: made on the host, then copied to the device as it is.
#pragma once

#include "csrc/conv/conv.h"
#include "csrc/gemm/cuda_pack.h"

namespace qk {

struct ConvCudaPart {
  ConvPhase phase;
  bool depthwise, runs;
  int64_t taps, depth;
  int64_t offset, bytes;
  CudaPackedLayout layout;  // offsets inside of the part

  int64_t end() const { return offset + bytes; }
};

// Direct kernel: one input channel a group.
inline bool is_cuda_depthwise(const ConvShape& shape) {
  return shape.groups > 1 && shape.in_per_group() == 1;
}

// Part `index`, which lies at `offset`.
ConvCudaPart conv_cuda_part(const ConvShape& shape, int64_t index, int64_t offset);

int64_t packed_conv_cuda_bytes(const ConvShape& shape, const CudaPackedFacts& facts);
CudaPackedFacts conv_cuda_facts(const ConvSource& source);
// kKTooLarge and kBadScale as pack_conv.
Status pack_conv_cuda(const ConvSource& source, void* dst);
// kBadShape if `length` is not that of the parts of this shape.
Status read_conv_cuda_facts(int64_t length, const ConvShape& shape, CudaPackedFacts* facts);

}  // namespace qk
