// quantize and dequantize on a CUDA device: the formulas and the bits of quantize.h.
//
// Layout: x and q are dense and in one memory layout (grid.h, DenseGrid).
// Memory: every pointer, scales and zero points too, is device memory of the caller. Launches are
// asynchronous on `stream`, never synchronize and allocate nothing: a CUDA graph can capture them.
// Numbers: the bits of the CPU; 1.0f / scale is IEEE division on the device too.
// Trick: a thread moves 16 bytes of the wider side.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/base/dtype.h"
#include "csrc/quantize/grid.h"

namespace qk {

struct QuantizeCudaArgs {
  const void* x;
  FloatType x_type;
  uint8_t* q;  // an int8 code is stored as its two's complement
  int32_t qmin;
  int32_t qmax;
  DenseGrid grid;
};

struct DequantizeCudaArgs {
  const void* q;
  CodeType q_type;
  void* x;
  FloatType x_type;
  DenseGrid grid;
};

cudaError_t quantize_cuda(const QuantizeCudaArgs& args, cudaStream_t stream);
cudaError_t dequantize_cuda(const DequantizeCudaArgs& args, cudaStream_t stream);

}  // namespace qk
