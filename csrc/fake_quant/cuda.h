// fake_quant and its backward on a CUDA device: the formulas and the bits of fake_quant.h and of
// fake_quant_backward/backward.h, for float32, bfloat16 and float16.
//
// Layout: every tensor is dense and in one memory layout (quantize/grid.h, DenseGrid).
// Memory: every pointer, scales and zero points too, is device memory of the caller; y may alias x
// and out may alias grad, exactly, not partly. Launches are asynchronous on `stream`, never
// synchronize and allocate nothing: a CUDA graph can capture them.
// Numbers: the bits of the CPU; 1.0f / scale is IEEE division on the device too.
// Trick: a thread moves 16 bytes a tensor; the backward recomputes where the gradient passes.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/base/dtype.h"
#include "csrc/quantize/grid.h"

namespace qk {

struct FakeQuantCudaArgs {
  const void* x;
  void* y;
  FloatType type;
  int32_t qmin;
  int32_t qmax;
  DenseGrid grid;
};

struct FakeQuantBackwardCudaArgs {
  const void* grad;
  const void* x;
  void* out;
  FloatType type;
  int32_t qmin;
  int32_t qmax;
  DenseGrid grid;
};

cudaError_t fake_quant_cuda(const FakeQuantCudaArgs& args, cudaStream_t stream);
cudaError_t fake_quant_backward_cuda(const FakeQuantBackwardCudaArgs& args, cudaStream_t stream);

}  // namespace qk
