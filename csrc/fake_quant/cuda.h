// fake_quant on a CUDA device: the formula and the bits of fake_quant.h, for float32.
//
// Layout: x and y are dense [outer, channels, inner]; channels == 1 is the per-tensor case.
// Memory: every pointer, scale and zero_point too, is device memory of the caller; y may alias x
// exactly, not partly. The launch is asynchronous on `stream`, never synchronizes and allocates
// nothing, so it can be captured in a CUDA graph.
// Numbers: the same bits as on the CPU; 1.0f / scale is IEEE division on the device too.
// Trick: one thread owns 16 bytes (4 elements) and divides once to find its channel, then counts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace qk {

struct FakeQuantCudaArgs {
  const float* x;
  float* y;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  const float* scale;         // [channels]
  const int32_t* zero_point;  // [channels]
  int32_t qmin;
  int32_t qmax;
};

cudaError_t fake_quant_cuda(const FakeQuantCudaArgs& args, cudaStream_t stream);

}  // namespace qk
