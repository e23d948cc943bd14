// fake_quant on a CUDA device: the formula and the bits of fake_quant.h.
//
// Every pointer of the arguments, scale and zero_point too, is device memory. The launch is
// asynchronous on `stream`, never synchronizes and allocates nothing, so it can be captured in a
// CUDA graph.
// Trick: one thread owns 16 bytes (4 elements) and divides once to find its channel, then counts.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/fake_quant/fake_quant.h"

namespace qk {

cudaError_t fake_quant_cuda(const FakeQuantArgs& args, cudaStream_t stream);

}  // namespace qk
