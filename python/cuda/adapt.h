// What the CUDA half of the seam adds to python/adapt.h: torch's current stream,
// launch errors, moves between devices, and the checks of packed weights.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "csrc/gemm/cuda_pack.h"
#include "csrc/gemm/cuda_plan.h"
#include "csrc/quantize/grid.h"
#include "python/epilogue.h"

// libtorch_cuda.so has it, libtorch_cpu.so has not: weak, so that a wheel with CUDA kernels also
// loads under a CPU build of torch, where none of this runs.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace qk::seam {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline cudaStream_t current_stream(const Tensor& t) { return current_stream(t.get_device_index()); }

// The device of an op's first tensor, which decides where all of them must be; an error if it is
// too old for the kernels.
int32_t guarded_device(const char* op, const Tensor& t);

inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // forgotten, or a later call would report it
  STD_TORCH_CHECK(error == cudaSuccess, op,
                  ": CUDA kernel failed to start: ", cudaGetErrorString(error));
}

// The grid of a kernel that goes through `out` (dense) and tensors in its layout in memory order.
DenseGrid dense_grid(const Tensor& out, std::optional<int64_t> axis, const GridView& grid);
// t itself if its elements lie as those of `out`, else a copy that does.
Tensor in_layout_of(const Tensor& out, const Tensor& t);

Tensor to_cpu(const Tensor& t);
OptionalTensor to_cpu(const OptionalTensor& t);
Tensor to_device_of(const Tensor& like, const Tensor& t);

// The current device. QKERNELS_WGMMA=1, at the first call of the process, asks for the kernels of
// sm_90a.
CudaMachine current_machine(const char* op);
// Few enough blocks for one launch of a linear layer.
void check_launch_size(const char* op, int64_t rows, int64_t out_features);

// What a launch has to know of a packed weight. Its bytes are not read: that would wait for the
// device.
CudaPackedFacts check_packed_cuda(const char* op, const char* pack_op, const Tensor& packed,
                                  int64_t n, int64_t taps, int64_t depth);
// Whether the residual is int8.
bool check_residual_cuda(const char* op, const OptionalTensor& residual,
                         const CudaPackedFacts& facts, const std::vector<int64_t>& output_sizes,
                         const Tensor& input);

}  // namespace qk::seam
