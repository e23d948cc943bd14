// Signs in training on a CUDA device: the formulas and the bits of binary.h.
//
// Layout: every tensor is dense and in one memory layout.
// Memory: device memory of the caller; out may alias grad exactly. Launches are asynchronous on
// `stream`, never synchronize and allocate nothing: a CUDA graph can capture them.
// Trick: 16 bytes a thread and tensor.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/binary/binary.h"

namespace qk {

cudaError_t binary_sign_cuda(const SignArgs& args, cudaStream_t stream);
cudaError_t binary_sign_backward_cuda(const SignBackwardArgs& args, cudaStream_t stream);

}  // namespace qk
