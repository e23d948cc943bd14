// max_pool and avg_pool on a CUDA device: the formulas, the arguments and the bits of pool.h.
//
// Memory: every pointer is device memory of the caller. Launches are asynchronous on `stream`,
// never synchronize and allocate nothing: a CUDA graph can capture them.
// Trick: a thread reduces one window for several neighbouring channels (16 of a max pool, 4 of an
// average), the window clipped to the input beforehand.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/pool/pool.h"

namespace qk {

cudaError_t max_pool_cuda(const MaxPoolArgs& args, cudaStream_t stream);
cudaError_t avg_pool_cuda(const AvgPoolArgs& args, cudaStream_t stream);

}  // namespace qk
