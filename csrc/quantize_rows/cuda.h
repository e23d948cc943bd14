// quantize_rows on a CUDA device: the formulas and the bits of quantize_rows.h.
//
// Memory: every pointer of the args is device memory of the caller. A launch is asynchronous on
// `stream`, never synchronizes and allocates nothing: a CUDA graph can capture it.
// Numbers: the bits of the CPU.
// Trick: a block does a row, 16 bytes a thread where rows are aligned; its second pass reads the
// row from L2.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/quantize_rows/quantize_rows.h"

namespace qk {

cudaError_t quantize_rows_cuda(const QuantizeRowsArgs& args, cudaStream_t stream);

}  // namespace qk
