// Observers on a CUDA device: the extremes, the state and the grid of observe.h, to the bit.
//
// Layout: x is dense (quantize/grid.h, DenseGrid; its scale and zero point are unused).
// Memory: every pointer is device memory of the caller, the workspace too. Launches are
// asynchronous on `stream`, never synchronize and allocate nothing: a CUDA graph can capture them.
// Numbers: those of the CPU. Nothing is reported: a batch with a NaN or an infinity leaves state
// and grid as they were unless those are to be ignored.
// Trick: blocks leave the extremes of their runs in the workspace, a block a channel joins them, a
// thread a channel moves the state.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/observe/observe.h"

namespace qk {

struct MinMaxCudaArgs {
  const void* x;
  FloatType type;
  DenseGrid grid;
  float* low;  // [channels]
  float* high;
  int64_t* non_finite;  // [2]: NaN, infinities
  void* workspace;      // minmax_cuda_workspace bytes, aligned to 16
};

int64_t minmax_cuda_workspace(const DenseGrid& grid);
cudaError_t minmax_cuda(const MinMaxCudaArgs& args, cudaStream_t stream);

struct ObserveCudaArgs {
  const void* x;
  FloatType type;
  DenseGrid grid;
  ObserverRule rule;
  ObserverState state;
  int64_t* non_finite;  // [2], added to; null: a batch that is not finite changes nothing
  bool* clipped;        // whether x has values outside of the new grid; may be null
  void* workspace;      // observe_cuda_workspace bytes, aligned to 16
};

int64_t observe_cuda_workspace(const DenseGrid& grid);
cudaError_t observe_cuda(const ObserveCudaArgs& args, cudaStream_t stream);

}  // namespace qk
