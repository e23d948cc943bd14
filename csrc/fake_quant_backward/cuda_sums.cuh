// The deterministic sums of the training kernels on CUDA: the lanes and trees of backward.h.
#pragma once

#include "csrc/base/cuda.cuh"
#include "csrc/fake_quant_backward/backward.h"

namespace qk::cuda {

// The sum of the terms of a run, `n` floats in shared memory from `terms` on: of one lane, and on
// every one of the 16 threads that ask for it together, of all.
QK_DEVICE double sum_run(uint32_t terms, uint32_t lane, uint32_t n) {
  float lane_sum = 0;
#pragma unroll 8
  for (uint32_t i = lane; i < n; i += kSumLanes) {
    lane_sum += bits_float(shared_load_u32(terms + i * 4));
  }
  double sum = static_cast<double>(lane_sum);
#pragma unroll
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, width);
  }
  return sum;
}

// The sum of partial(0) ... partial(count - 1), on thread 0; all kThreads threads call it.
// Neighbours are added until one is left; whoever has no neighbour waits, the shorter sums first:
// the tree of backward.cc. `level` has room for `count` sums.
template <int kThreads, class Partial>
QK_DEVICE double tree_sum(const Partial& partial, int64_t count, double* level) {
  double total = 0;
  const double* below = nullptr;  // of the level before; null: the partial sums
  const auto value = [&](int64_t j) { return below != nullptr ? below[j] : partial(j); };
#pragma unroll 1
  for (int64_t n = count; n > 0; n /= 2) {
    if (n % 2 == 1 && threadIdx.x == 0) total = value(n - 1) + total;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < n / 2; i += kThreads) {
      level[i] = value(2 * i) + value(2 * i + 1);
    }
    __syncthreads();
    below = level;
    level += n / 2;
  }
  return total;
}

}  // namespace qk::cuda
