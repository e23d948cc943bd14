// Plans and starts linear on CUDA.
#include "csrc/gemm/cuda.h"

namespace qk {
namespace {

bool is_aligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % 16 == 0;
}

bool is_general(const LinearCudaArgs& args) {
  return args.facts.weight_zero_points || !is_aligned(args.input, args.input_row_stride);
}

IgemmCudaArgs kernel_args(const LinearCudaArgs& args, const CudaGemmPlan& plan) {
  return igemm_cuda_args({.packed = static_cast<const uint8_t*>(args.packed),
                          .layout = cuda_packed_layout(args.n, 1, args.depth),
                          .facts = args.facts,
                          .m = args.rows,
                          .n = args.n,
                          .groups = 1,
                          .out = args.out,
                          .residual = args.residual,
                          .residual_row_stride = args.residual_row_stride,
                          .residual_signed = args.residual_signed,
                          .workspace = args.workspace,
                          .scales = args.scales,
                          .scaled_output = args.scaled_output},
                         plan);
}

}  // namespace

IgemmCudaArgs igemm_cuda_args(const IgemmCudaCall& call, const CudaGemmPlan& plan) {
  const auto part = [&call](int64_t offset) { return call.packed + offset; };
  IgemmCudaArgs k{};
  k.m = call.m;
  k.n = call.n;
  k.k = call.layout.row_bytes;
  k.group_columns = call.n / call.groups;
  k.weight = reinterpret_cast<const int8_t*>(part(call.layout.weight));
  k.init = reinterpret_cast<const int32_t*>(part(call.layout.init));
  k.zero_point = call.facts.weight_zero_points
                     ? reinterpret_cast<const int32_t*>(part(call.layout.zero_point))
                     : nullptr;
  k.addend = reinterpret_cast<const float*>(part(call.layout.addend));
  k.mult = reinterpret_cast<const float*>(part(call.layout.mult));
  k.epilogue = reinterpret_cast<const Epilogue*>(call.packed);
  k.scales = call.scales;
  k.output = call.scales.row_scale == nullptr ? call.facts.output : call.scaled_output;
  k.out = call.out;
  k.out_row_bytes = call.n * output_bytes(k.output);
  k.residual = call.residual;
  k.residual_row_bytes = call.residual_row_stride;
  k.residual_signed = call.residual_signed;
  k.vector_out = is_aligned(k.out, k.out_row_bytes) &&
                 k.group_columns * output_bytes(k.output) % 16 == 0 &&
                 (k.residual == nullptr ||
                  (is_aligned(k.residual, k.residual_row_bytes) && k.group_columns % 16 == 0));
  const CudaTile& tile = kCudaTiles[plan.tile];
  k.tiles_m = static_cast<int>((k.m + tile.rows - 1) / tile.rows);
  k.tiles_n = static_cast<int>((k.group_columns + tile.columns - 1) / tile.columns);
  k.groups = static_cast<int>(call.groups);
  k.splits = plan.splits;
  k.slices = static_cast<uint8_t*>(call.workspace);
  k.arrived = reinterpret_cast<unsigned*>(k.slices + int64_t{k.tiles_m} * k.tiles_n * call.groups *
                                                         k.splits * tile.rows * tile.columns * 4);
  return k;
}

cudaError_t clear_arrivals(const IgemmCudaArgs& k, cudaStream_t stream) {
  if (k.splits == 1) return cudaSuccess;
  const size_t tiles = static_cast<size_t>(k.tiles_m) * k.tiles_n * k.groups;
  return cudaMemsetAsync(k.arrived, 0, sizeof(unsigned) * tiles, stream);
}

cudaError_t cuda_machine(CudaMachine* machine) {
  int device = 0, major = 0, minor = 0, count = 0, per_block = 0, per_multiprocessor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&count, cudaDevAttrMultiProcessorCount);
  ask(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  *machine = {major * 10 + minor, count, per_block, per_multiprocessor, false};
  return error;
}

CudaGemmPlan plan_linear_cuda(const LinearCudaArgs& args, const CudaMachine& machine) {
  // Rows that are empty, overlap or lie too far apart are not for the TMA.
  if (machine.wgmma && machine.capability == 90 && args.rows >= kCudaWgmmaRows && args.depth > 0 &&
      !is_general(args) && args.input_row_stride >= args.depth &&
      args.input_row_stride < int64_t{1} << 40) {
    return {.tile = kCudaWgmmaTile, .wgmma_blocks = machine.multiprocessors};
  }
  return plan_cuda_gemm(args.rows, args.n, cuda_depth(args.depth), 1, machine,
                        is_general(args) ? kGeneralCudaTiles : kAllCudaTiles);
}

int64_t linear_cuda_workspace(const LinearCudaArgs& args, const CudaMachine& machine) {
  if (args.rows <= kCudaGemvRows) return 0;
  return cuda_gemm_workspace(plan_linear_cuda(args, machine), args.rows, args.n, 1);
}

cudaError_t linear_cuda(const LinearCudaArgs& args, const CudaGemmPlan& plan, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  const IgemmCudaArgs k = kernel_args(args, plan);
  const cuda::RowSource source{args.input, args.input_row_stride, args.depth,
                               is_aligned(args.input, args.input_row_stride)};
  if (args.rows > kCudaGemvRows) {
    if (const cudaError_t error = clear_arrivals(k, stream); error != cudaSuccess) return error;
  }
  if (plan.wgmma_blocks > 0) {
    return cuda::launch_linear_wgmma(k, source, args.facts.input_signed, plan.wgmma_blocks, stream);
  }
  const auto start = args.facts.input_signed ? cuda::launch_linear_s8 : cuda::launch_linear_u8;
  return start(k, source, is_general(args) ? -1 : plan.tile, stream);
}

}  // namespace qk
