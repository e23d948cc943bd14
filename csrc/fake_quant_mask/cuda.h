// fake_quant with a bit mask, and its backward, on a CUDA device: the formulas, the bits and the
// masks of mask.h.
//
// Layout: dense tensors in one memory layout; rows of the mask as mask_layout says.
// Memory: every pointer is device memory of the caller, `clipped` too; out may alias grad exactly.
// Launches are asynchronous on `stream`, never synchronize and allocate nothing: a CUDA graph can
// capture them.
// Trick: a thread does the 8 elements of a byte of the mask. The codes that a clamp leaves are
// found where the grid is, on the device: nobody waits for its values.
#pragma once

#include <cuda_runtime_api.h>

#include <limits>

#include "csrc/fake_quant_mask/mask.h"

namespace qk {

struct FakeQuantMaskCudaArgs {
  const void* x;
  void* y;
  uint8_t* mask;
  uint8_t* codes;  // null: none
  bool* clipped;   // set if a bit is 0
  FloatType type;
  int32_t qmin;
  int32_t qmax;
  DenseGrid grid;
  MaskLayout layout;
  // A clamp in front of one grid.
  float floor = -std::numeric_limits<float>::infinity();
  float ceiling = std::numeric_limits<float>::infinity();
};

struct MaskBackwardCudaArgs {
  const void* grad;
  const uint8_t* mask;
  void* out;
  FloatType type;
  int64_t size;
  MaskLayout layout;
};

cudaError_t fake_quant_mask_cuda(const FakeQuantMaskCudaArgs& args, cudaStream_t stream);
cudaError_t mask_backward_cuda(const MaskBackwardCudaArgs& args, cudaStream_t stream);

}  // namespace qk
