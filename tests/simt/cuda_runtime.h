// Stands in for the toolkit's header where a kernel runs on the emulator: the words of CUDA C++
// that the kernels of csrc/ use.
#pragma once

#include "tests/simt/cuda_runtime_api.h"
#include "tests/simt/simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (simt::this_thread().id)
#define blockIdx (simt::state.block.index)
#define blockDim (simt::state.block_size)
#define gridDim (simt::state.grid)

using dim3 = simt::Dim3;
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void __syncthreads() { simt::sync_threads(); }
inline void __syncwarp(uint32_t mask = simt::kFullMask) { simt::sync_warp(mask); }
inline void __threadfence() {}
inline int __popcll(uint64_t value) { return __builtin_popcountll(value); }
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  return simt::shuffle_xor(mask, value, lane_mask);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  return simt::ballot(mask, predicate);
}
template <typename T>
T atomicAdd(T* to, T value) {
  return simt::atomic_add(to, value);
}
