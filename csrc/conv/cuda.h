// Convolution on a CUDA device: conv.h's formula and bits, for every rank, padding mode, group and
// dilation, and transposed.
//
// Layout: input, residual and output dense N, D, H, W, C; the weight as cuda_pack.h lays it out.
// Memory: every pointer is device memory of the caller, the workspace too (conv_cuda_workspace).
//   Launches are asynchronous on `stream` and read nothing back: a CUDA graph can capture them.
// Numbers: those of the CPU, for any tile and any split of K.
// Tricks: the GEMM of gemm/cuda_tile.cuh whose rows of A are gathered from the image on the way
//   (implicit GEMM, see cuda_kernels.cuh); a 1x1 convolution is linear; one input channel a group
//   goes to a direct kernel; a transposed convolution is one GEMM a phase.
#pragma once

#include "csrc/conv/cuda_pack.h"
#include "csrc/gemm/cuda.h"

namespace qk {

struct ConvCudaArgs {
  ConvShape shape;
  ConvExtent extent;
  const void* packed;
  CudaPackedFacts facts;
  const uint8_t* input;
  void* out;
  const uint8_t* residual;  // dense, like the output
  bool residual_signed;
  void* workspace;  // aligned to 16
};

// Whether the sizes are within what one launch can index: pixels and image bytes below 2^31.
bool conv_cuda_fits(const ConvCudaArgs& args);
int64_t conv_cuda_workspace(const ConvCudaArgs& args, const CudaMachine& machine);
cudaError_t conv_cuda(const ConvCudaArgs& args, const CudaMachine& machine, cudaStream_t stream);

namespace cuda {

// Where the rows of A come from: row m is the m-th output pixel of a phase.
struct PixelSource {
  const uint8_t* input;
  const uint8_t* padding;  // 16 bytes and more of the input's zero point
  int32_t in[kConvDims], out[kConvDims], count[kConvDims];
  int32_t in_stride[kConvDims], in_offset[kConvDims], in_dilation[kConvDims], taps[kConvDims];
  int32_t out_first[kConvDims], out_step[kConvDims];
  int32_t channels, group_channels;
  int32_t depth, chunked_depth;  // of a tap; rounded up to whole chunks
  PaddingMode mode;
  bool runs, dense_output, aligned;
};

// The tiles with a kernel for pixels that are aligned to 16 bytes.
inline constexpr unsigned kConvCudaTiles = 1u << 1 | 1u << 2 | 1u << 3 | 1u << 4;

// `tile`: an index of kCudaTiles in kConvCudaTiles; negative: the kernel for any alignment, runs
// and weight zero points.
cudaError_t launch_conv_u8(const IgemmCudaArgs& args, const PixelSource& source, int tile,
                           cudaStream_t stream);
cudaError_t launch_conv_s8(const IgemmCudaArgs& args, const PixelSource& source, int tile,
                           cudaStream_t stream);

}  // namespace cuda
}  // namespace qk
