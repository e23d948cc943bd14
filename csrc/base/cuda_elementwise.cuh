// Elementwise kernels on CUDA: how a thread finds its elements, and the launch.
//
// An operation is a struct by value with
//   kPerThread              elements a thread does at once, 16 bytes of its widest operand
//   run<kCount>(first)      does the kCount elements from `first` on, whose addresses are aligned
//   to
//                           kCount elements
//   aligned()               on the host: whether every kPerThread elements are
// A thread runs kPerThread elements in one piece, or one after the other: in the tail, or where a
// tensor starts in between. Index is 32-bit where the size allows it: 64-bit division is slow.
#pragma once

#include "csrc/base/cuda.cuh"
#include "csrc/base/dtype.h"

namespace qk::cuda {

inline constexpr int kElementwiseThreads = 256;

template <class Op, typename Index>
__global__ void __launch_bounds__(kElementwiseThreads, 4)
    elementwise_kernel(const __grid_constant__ Op op, Index size, bool aligned) {
  constexpr Index kStep = Op::kPerThread;
  const Index first = (static_cast<Index>(blockIdx.x) * kElementwiseThreads + threadIdx.x) * kStep;
  if (first >= size) return;
  if (aligned && size - first >= kStep) {
    op.template run<Op::kPerThread>(first);
    return;
  }
  const Index end = size - first < kStep ? size : first + kStep;
#pragma unroll 1
  for (Index i = first; i < end; ++i) op.template run<1>(i);
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

template <typename Index, class Op>
cudaError_t launch_elementwise_by(const Op& op, int64_t size, cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  constexpr int64_t kPerBlock = int64_t{kElementwiseThreads} * Op::kPerThread;
  const int64_t blocks = (size - 1) / kPerBlock + 1;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(elementwise_kernel<Op, Index>, static_cast<unsigned>(blocks), kElementwiseThreads,
                0, stream, op, static_cast<Index>(size), op.aligned());
}

// At most 2^31 elements.
template <class Op>
cudaError_t launch_elementwise_32(const Op& op, int64_t size, cudaStream_t stream) {
  return launch_elementwise_by<uint32_t>(op, size, stream);
}

template <class Op>
cudaError_t launch_elementwise(const Op& op, int64_t size, cudaStream_t stream) {
  return size <= (int64_t{1} << 31) ? launch_elementwise_32(op, size, stream)
                                    : launch_elementwise_by<uint64_t>(op, size, stream);
}

}  // namespace qk::cuda
