// The backward of fake_quant with the sums of learned grids (LSQ, LSQ+, PACT) on a CUDA device: the
// formulas and the bits of backward.h, its sums too.
//
// Layout: every tensor is dense and in one memory layout (quantize/grid.h, DenseGrid).
// Memory: every pointer is device memory of the caller, the workspace too; `out` may alias `grad`
// exactly. Launches are asynchronous on `stream`, never synchronize and allocate nothing: a CUDA
// graph can capture them.
// Numbers: the runs, lanes and trees of backward.h, so that the sums have the CPU's bits, and
// depend on no order of blocks.
// Trick: a block does a run: all threads compute terms and leave them in shared memory, where 32
// threads add up the 16 lanes of both sums; a second kernel joins the runs of each channel
// pairwise.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/base/dtype.h"
#include "csrc/quantize/grid.h"

namespace qk {

struct LsqBackwardCudaArgs {
  const void* grad;
  const void* x;
  void* out;
  FloatType type;
  int32_t qmin;
  int32_t qmax;
  bool clips;  // PACT
  DenseGrid grid;
  double factor;
  double* workspace;       // lsq_cuda_workspace elements
  float* scale_grad;       // [channels]
  float* zero_point_grad;  // [channels]
};

int64_t lsq_cuda_workspace(const DenseGrid& grid);
cudaError_t lsq_backward_cuda(const LsqBackwardCudaArgs& args, cudaStream_t stream);

// The grid's zero points of learned ones.
cudaError_t round_zero_points_cuda(const float* learned, int32_t* zero_point, int64_t n,
                                   int32_t qmin, int32_t qmax, cudaStream_t stream);

}  // namespace qk
