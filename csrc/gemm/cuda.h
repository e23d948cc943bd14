// The int8 GEMM on a CUDA device: linear.h's formula and bits.
//
// Layout: input rows of `depth` bytes at any stride and alignment; the weight as cuda_pack.h lays
// it
//   out; out dense [rows, n].
// Memory: every pointer is device memory of the caller, the workspace too (linear_cuda_workspace).
//   Launches are asynchronous on `stream` and read nothing back, so they can be captured in a
//   graph.
// Numbers: those of the CPU, for any tile and any split of K.
// Tricks: tensor cores (mma m16n8k32) with a ring of asynchronous copies, see cuda_tile.cuh; up to
//   kCudaGemvRows rows a kernel of dot products that reads the weight once, see cuda_kernels.cuh;
//   where it is asked for, wgmma and TMA, see cuda_wgmma_sm90a.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/gemm/cuda_pack.h"
#include "csrc/gemm/cuda_plan.h"

namespace qk {

inline constexpr int kCudaGemvRows = 8;

// What every kernel of the GEMM takes by value; filled in from the packed bytes and the plan.
struct IgemmCudaArgs {
  int64_t m, n, k;        // k: bytes of a packed row
  int64_t group_columns;  // of n; block z computes group z
  const int8_t* weight;
  const int32_t* init;
  const int32_t* zero_point;
  const float* addend;
  const float* mult;
  const Epilogue* epilogue;
  RowScales scales;  // row_scale null: none; else addend, mult and epilogue are not read
  OutputType output;
  void* out;
  int64_t out_row_bytes;
  const uint8_t* residual;
  int64_t residual_row_bytes;
  bool residual_signed;
  bool vector_out;  // out and residual can be reached 16 bytes at a time
  int tiles_m, tiles_n, groups, splits;
  uint8_t* slices;
  unsigned* arrived;
};

namespace cuda {

// Where the rows of A lie. `aligned`: to 16 bytes.
struct RowSource {
  const uint8_t* input;
  int64_t row_stride, depth;
  bool aligned;
};

// `tile`: an index of kCudaTiles; negative: the kernel for any alignment and weight zero points.
cudaError_t launch_linear_u8(const IgemmCudaArgs& args, const RowSource& source, int tile,
                             cudaStream_t stream);
cudaError_t launch_linear_s8(const IgemmCudaArgs& args, const RowSource& source, int tile,
                             cudaStream_t stream);

// The kernel of sm_90a, on a grid of at most `blocks`. Rows of A are aligned, and there are no
// weight zero points. cudaErrorCallRequiresNewerDriver: the driver has no tensor maps.
cudaError_t launch_linear_wgmma(const IgemmCudaArgs& args, const RowSource& source,
                                bool input_signed, int blocks, cudaStream_t stream);

}  // namespace cuda

// A GEMM over packed bytes, in `groups` groups of n / groups columns. out is dense [.., n].
struct IgemmCudaCall {
  const uint8_t* packed;
  CudaPackedLayout layout;
  CudaPackedFacts facts;
  int64_t m, n, groups;
  void* out;
  const uint8_t* residual;
  int64_t residual_row_stride;
  bool residual_signed;
  void* workspace;
  RowScales scales = {};
  OutputType scaled_output = OutputType::kF32;
};
IgemmCudaArgs igemm_cuda_args(const IgemmCudaCall& call, const CudaGemmPlan& plan);
// Before a launch with a split of K.
cudaError_t clear_arrivals(const IgemmCudaArgs& args, cudaStream_t stream);

struct LinearCudaArgs {
  const void* packed;  // device
  CudaPackedFacts facts;
  int64_t n, depth;
  const uint8_t* input;
  int64_t rows, input_row_stride;
  void* out;
  const uint8_t* residual;
  int64_t residual_row_stride;
  bool residual_signed;
  void* workspace;  // aligned to 16
  // Rows with grids of their own, for weights packed with an int32 output: what is stored then.
  RowScales scales = {};
  OutputType scaled_output = OutputType::kF32;
};

// Of the current device.
cudaError_t cuda_machine(CudaMachine* machine);
CudaGemmPlan plan_linear_cuda(const LinearCudaArgs& args, const CudaMachine& machine);
int64_t linear_cuda_workspace(const LinearCudaArgs& args, const CudaMachine& machine);
// `plan` as plan_linear_cuda made it, or another for tests.
cudaError_t linear_cuda(const LinearCudaArgs& args, const CudaGemmPlan& plan, cudaStream_t stream);

}  // namespace qk
