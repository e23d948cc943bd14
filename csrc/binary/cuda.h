// Signs, and products of packed signs, on a CUDA device: the formulas and the bits of binary.h.
//
// Layout: in training every tensor is dense and in one memory layout; packed signs as in binary.h.
// Memory: device memory of the caller; out may alias grad exactly. Launches are asynchronous on
// `stream`, never synchronize and allocate nothing: a CUDA graph can capture them.
// Tricks: in training 16 bytes a thread and tensor. In a product a warp is a block of output
// channels, so that the words of the weight are read side by side and those of the input by all
// lanes at once; a word of the weight meets several pixels.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/binary/binary.h"

namespace qk {

cudaError_t binary_sign_cuda(const SignArgs& args, cudaStream_t stream);
cudaError_t binary_sign_backward_cuda(const SignBackwardArgs& args, cudaStream_t stream);

cudaError_t binary_pack_cuda(const BinaryPackArgs& args, cudaStream_t stream);
// cudaErrorInvalidConfiguration: too many pixels or channels for a launch.
cudaError_t binary_conv_cuda(const BinaryConvArgs& args, cudaStream_t stream);

}  // namespace qk
