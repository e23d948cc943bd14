// The extremes of many values on CUDA, found by a block together.
#pragma once

#include "csrc/base/cuda.cuh"
#include "csrc/base/dtype.h"

namespace qk::cuda {

// Of finite values; low > high: of none. And how many were not finite, up to 2^32 - 1.
struct Extremes {
  float low = bits_float(0x7f800000u), high = bits_float(0xff800000u);
  uint32_t nans = 0, infinities = 0;

  QK_DEVICE void add(float v) {
    if (v - v == 0.0f) {
      if (v < low) low = v;
      if (v > high) high = v;
    } else if (v != v) {
      ++nans;
    } else {
      ++infinities;
    }
  }
  QK_DEVICE void join(const Extremes& other) {
    if (other.low < low) low = other.low;
    if (other.high > high) high = other.high;
    nans = saturated(nans, other.nans);
    infinities = saturated(infinities, other.infinities);
  }

 private:
  QK_DEVICE static uint32_t saturated(uint32_t a, uint32_t b) { return a + b < a ? ~0u : a + b; }
};

QK_DEVICE Extremes join_lanes(Extremes mine) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    Extremes other;
    other.low = __shfl_xor_sync(kAllLanes, mine.low, step);
    other.high = __shfl_xor_sync(kAllLanes, mine.high, step);
    other.nans = __shfl_xor_sync(kAllLanes, mine.nans, step);
    other.infinities = __shfl_xor_sync(kAllLanes, mine.infinities, step);
    mine.join(other);
  }
  return mine;
}

// Those of all threads of the block, on every thread. Uses 16 bytes of shared memory a warp; all
// threads call it.
template <int kThreads>
QK_DEVICE Extremes join_block(Extremes mine) {
  mine = join_lanes(mine);
  const uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (lane == 0) {
    shared_store_u128(
        shared_memory() + warp * 16,
        uint4{float_bits(mine.low), float_bits(mine.high), mine.nans, mine.infinities});
  }
  __syncthreads();
  Extremes all;
#pragma unroll
  for (uint32_t w = 0; w < kThreads / kWarpSize; ++w) {
    const uint4 v = shared_load_u128(shared_memory() + w * 16);
    Extremes other;
    other.low = bits_float(v.x), other.high = bits_float(v.y);
    other.nans = v.z, other.infinities = v.w;
    all.join(other);
  }
  return all;
}

template <int kThreads>
inline constexpr size_t kJoinBytes = kThreads / kWarpSize * 16;

// Those of n values from `from` on that this thread looks at: 16 bytes at a time where `from` is
// aligned.
template <typename T, int kThreads>
QK_DEVICE Extremes extremes_of(const T* from, int64_t n) {
  constexpr int kVector = 16 / sizeof(T);
  Extremes found;
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
  const int64_t vectors = aligned ? n / kVector * kVector : 0;
#pragma unroll 2
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < vectors; i += kThreads * kVector) {
    const auto v = load_vector<kVector>(from + i);
#pragma unroll
    for (int k = 0; k < kVector; ++k) found.add(to_float(v.v[k]));
  }
#pragma unroll 1
  for (int64_t i = vectors + threadIdx.x; i < n; i += kThreads) found.add(to_float(from[i]));
  return found;
}

}  // namespace qk::cuda
