// All weights of a model in one launch on a CUDA device: the arguments, formulas and bits of
// foreach.h.
//
// Memory: items are host memory, read before the call returns; every pointer in them is device
// memory of the caller. Launches are asynchronous on `stream`, never synchronize and allocate
// nothing: a CUDA graph can capture them.
// Numbers: those of the CPU. A row that is not finite, whose grid is to be chosen, gets the scale
// NaN, and so does what is rounded with it: nothing can be reported from here.
// Trick: a block does a row of any item, its extremes, grid and output; up to kForeachItems items
// travel in the arguments of one launch. A long row is cut into pieces: a launch before finds their
// extremes, which every block of the row joins.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/foreach/foreach.h"

namespace qk {

inline constexpr int kForeachItems = 48;

int64_t foreach_cuda_workspace(const ForeachQuantArgs& args);
// clipped: [count] on the device, set for items with a clipped row, or a row that is not finite;
// may be null. workspace: foreach_cuda_workspace bytes on the device, aligned to 16.
cudaError_t foreach_fake_quant_cuda(const ForeachQuantArgs& args, bool* clipped, void* workspace,
                                    cudaStream_t stream);
cudaError_t foreach_fake_quant_backward_cuda(const ForeachBackwardArgs& args, cudaStream_t stream);

}  // namespace qk
