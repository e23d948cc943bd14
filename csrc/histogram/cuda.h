// The histogram of histogram.h on a CUDA device, to the bit.
//
// Memory: every pointer is device memory of the caller, the workspace too. Launches are
// asynchronous on `stream`, never synchronize and allocate nothing: a CUDA graph can capture them.
// Numbers: those of the CPU, in any order of blocks: what blocks add up are integers.
// Trick: a block counts in shared memory where the bins fit there; the range is worked out where it
// is needed, from the old one and the batch's, so that no launch waits for the host.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/histogram/histogram.h"

namespace qk {

struct HistogramCudaArgs {
  const void* x;
  FloatType type;
  int64_t n;
  const float* batch_low;  // [1]
  const float* batch_high;
  float* low;
  float* high;
  float* histogram;  // [bins]
  int64_t bins;
  void* workspace;  // histogram_cuda_workspace bytes, aligned to 16
};

int64_t histogram_cuda_workspace(int64_t bins);
cudaError_t observe_histogram_cuda(const HistogramCudaArgs& args, cudaStream_t stream);

}  // namespace qk
