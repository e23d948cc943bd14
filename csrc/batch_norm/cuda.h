// Batch normalization in training together with the fake-quantization behind it, on a CUDA device:
// the formulas and the bits of batch_norm.h, the running statistics and all sums too.
//
// Layout: [rows, channels] float32 in one block, the channel innermost.
// Memory: every pointer is device memory of the caller, the workspaces and the grid too; out may
// alias grad exactly. Launches are asynchronous on `stream`, never synchronize and allocate
// nothing: a CUDA graph can capture them.
// Numbers: the tasks, columns and trees of the CPU (walk.h, tree_sum.h), so that every sum has its
// bits, in any order of blocks. Where a NaN is an element's, its payload is the device's.
// Trick: a thread sums a column of a task and its warp reads neighbouring ones; the columns of a
// channel meet in shared memory, its tasks in the lanes of a warp, 32 at a time. The two passes
// that write have no order to keep: they see several rows as one that is whole vectors of 16 bytes,
// whatever the number of channels, and a thread keeps what belongs to its four columns over four
// rows. As on the CPU, the first pass of each direction starts at the end, which the cache has.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/batch_norm/batch_norm.h"

namespace qk {

// A grid for the whole tensor, where it lies, and the clamp before it.
struct NormCudaGrid {
  const float* scale;               // [1]
  const int32_t* zero_point;        // [1]; null: it is learned
  const float* learned_zero_point;  // [1], to be rounded
  int32_t qmin;
  int32_t qmax;
  float floor = -kNormInfinity;
  float ceiling = kNormInfinity;
};

using NormFakeQuantCudaArgs = NormFakeQuantOf<NormCudaGrid>;
using NormBackwardCudaArgs = NormBackwardOf<NormCudaGrid>;

int64_t batch_statistics_cuda_workspace(int64_t rows, int64_t channels);
// extremes: [2], of t. The workspace has the elements that the function before says.
cudaError_t batch_statistics_cuda(const BatchStatisticsArgs& args, float* extremes,
                                  cudaStream_t stream);

cudaError_t norm_fake_quant_cuda(const NormFakeQuantCudaArgs& args, cudaStream_t stream);

int64_t norm_backward_cuda_workspace(int64_t rows, int64_t channels);
cudaError_t norm_backward_cuda(const NormBackwardCudaArgs& args, cudaStream_t stream);

}  // namespace qk
