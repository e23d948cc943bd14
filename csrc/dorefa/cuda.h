// DoReFa on a CUDA device: the formulas and the bits of dorefa.h, sums and noise too.
//
// Layout: dense memory; a row of gradients (a sample) is contiguous.
// Memory: every pointer is device memory of the caller, the workspace too; out may alias grad
// exactly. Launches are asynchronous on `stream`, never synchronize and allocate nothing: a CUDA
// graph can capture them.
// Numbers: the bits of the CPU. A weight that is not finite gives NaN where the CPU reports it.
// Trick: the largest magnitude stays on the device, where the next kernel reads it; the gradient
// that goes through the maximum is known only after all runs are summed, and a last kernel looks
// again at the runs that hold the maximum alone.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/dorefa/dorefa.h"

namespace qk {

struct DorefaWeightCudaArgs {
  const void* grad;  // of the backward
  const void* x;
  void* out;
  FloatType type;
  int64_t n;
  const float* scale;         // [1]
  const int32_t* zero_point;  // [1]
  int32_t qmin, qmax;
  void* workspace;  // dorefa_cuda_workspace(n) bytes, aligned to 16
};

int64_t dorefa_cuda_workspace(int64_t n);
cudaError_t dorefa_weight_cuda(const DorefaWeightCudaArgs& args, cudaStream_t stream);
cudaError_t dorefa_weight_backward_cuda(const DorefaWeightCudaArgs& args, cudaStream_t stream);

struct DorefaGradientCudaArgs {
  const void* grad;
  void* out;
  FloatType type;
  int64_t rows, inner;  // at most 2^31 - 1 rows
  int32_t steps;        // 2^bits - 1
  const int64_t* seed;  // on the device; null: seed_value
  int64_t seed_value;
};

cudaError_t dorefa_gradient_cuda(const DorefaGradientCudaArgs& args, cudaStream_t stream);

}  // namespace qk
