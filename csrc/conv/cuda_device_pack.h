// The packed weights of cuda_pack.h made on the device, from tensors of the device: for layers that
// are trained, whose weight and grids are new at every step. A linear layer is a convolution of one
// tap.
//
// Layout: that of cuda_pack.h, to the byte. Memory: every pointer is device memory of the caller.
// Launches are asynchronous on `stream`, never synchronize and allocate nothing: a CUDA graph can
// capture them.
// Numbers: those of the host. Values are not checked: with a scale of zero or NaN the layer's
// outputs are not finite.
// Trick: a block an output channel: it copies the weights of the channel and sums them up.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/conv/cuda_pack.h"

namespace qk {

struct ConvDeviceSource {
  ConvSource source;  // its tensors are on the device; input_scale and input_zero_point are unused
  const float* input_scale;         // [1]
  const int32_t* input_zero_point;  // [1]
};

// dst: packed_conv_cuda_bytes(source.shape, conv_cuda_facts(source)) bytes, aligned to 64.
cudaError_t pack_conv_on_device(const ConvDeviceSource& source, void* dst, cudaStream_t stream);

}  // namespace qk
