// What the CUDA half of the seam adds to python/adapt.h: torch's current stream, and launch errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "python/adapt.h"

// libtorch_cuda.so has it, libtorch_cpu.so has not: weak, so that a wheel with CUDA kernels also
// loads under a CPU build of torch, where none of this runs.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace qk::seam {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op,
                  ": CUDA kernel failed to start: ", cudaGetErrorString(error));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t,
                              const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the device of x, cuda:", like.get_device_index());
}

}  // namespace qk::seam
