// lookup, add, mul and cat on a CUDA device: the formulas, the arguments and the bits of
// pointwise.h.
//
// Layout: out is dense in the order of its walk; the operands as on the CPU, any row contiguous
// inside or broadcast.
// Memory: every pointer is device memory of the caller, the table too (CatArgs::inputs is host
// memory, read before the call returns). Launches are asynchronous on `stream`, never synchronize
// and allocate nothing: a CUDA graph can capture them.
// Trick: a thread moves 16 codes, where rows allow it; the table stays in L1.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/pointwise/pointwise.h"

namespace qk {

cudaError_t lookup_cuda(const LookupArgs& args, cudaStream_t stream);
cudaError_t binary_cuda(const BinaryArgs& args, cudaStream_t stream);
cudaError_t cat_cuda(const CatArgs& args, cudaStream_t stream);

}  // namespace qk
