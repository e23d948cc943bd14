#include "csrc/histogram/cuda.h"

#include "csrc/base/cuda.cuh"
#include "csrc/base/float_types.h"

namespace qk {
namespace {

constexpr int kHistogramThreads = 256;
constexpr int64_t kHistogramRun = 16384;    // elements that a block counts at a time
constexpr int64_t kHistogramBlocks = 1024;  // at most
constexpr int64_t kSharedBins = 48 * 256;   // as many as the default shared memory holds
using Count = unsigned long long;

struct HistogramRanges {
  HistogramRange old, now;
  bool changes;

  QK_DEVICE explicit HistogramRanges(const HistogramCudaArgs& args)
      : old{*args.low, *args.high}, now(old) {
    const HistogramRange batch{*args.batch_low, *args.batch_high};
    changes = is_finite_range(batch);
    if (changes) now = wider(old, batch);
  }
};

QK_DEVICE Count* counts_of(const HistogramCudaArgs& args) {
  return static_cast<Count*>(args.workspace);
}
QK_DEVICE float* next_of(const HistogramCudaArgs& args) {
  return reinterpret_cast<float*>(counts_of(args) + args.bins);
}

// kShared: the bins of a block are in its shared memory.
template <typename T, bool kShared>
__global__ void __launch_bounds__(kHistogramThreads)
    histogram_count_kernel(const __grid_constant__ HistogramCudaArgs args) {
  constexpr int kVector = 16 / sizeof(T);
  const HistogramRanges ranges(args);
  if (!ranges.changes) return;
  const auto bins = static_cast<uint32_t>(args.bins);
  if constexpr (kShared) {
    for (uint32_t j = threadIdx.x; j < bins; j += kHistogramThreads) {
      cuda::shared_store_u32(cuda::shared_memory() + j * 4, 0);
    }
    __syncthreads();
  }
  const auto add = [&](T element) {
    const int32_t bin = histogram_bin(ranges.now, args.bins, to_float(element));
    if (bin < 0) return;
    if constexpr (kShared) {
      cuda::shared_count(cuda::shared_memory() + static_cast<uint32_t>(bin) * 4);
    } else {
      atomicAdd(counts_of(args) + bin, Count{1});
    }
  };
  const auto* x = static_cast<const T*>(args.x);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  for (int64_t run = int64_t{blockIdx.x} * kHistogramRun; run < args.n;
       run += int64_t{gridDim.x} * kHistogramRun) {
    const int64_t n = args.n - run < kHistogramRun ? args.n - run : kHistogramRun;
    const int64_t vectors = aligned ? n / kVector * kVector : 0;
    for (int64_t i = int64_t{threadIdx.x} * kVector; i < vectors;
         i += kHistogramThreads * kVector) {
      const auto v = cuda::load_vector<kVector>(x + run + i);
#pragma unroll
      for (int k = 0; k < kVector; ++k) add(v.v[k]);
    }
#pragma unroll 1
    for (int64_t i = vectors + threadIdx.x; i < n; i += kHistogramThreads) add(x[run + i]);
  }
  if constexpr (kShared) {
    __syncthreads();
    for (uint32_t j = threadIdx.x; j < bins; j += kHistogramThreads) {
      const uint32_t found = cuda::shared_load_u32(cuda::shared_memory() + j * 4);
      if (found > 0) atomicAdd(counts_of(args) + j, Count{found});
    }
  }
}

// A thread a bin: what is counted and what has moved there. Beside the old histogram, which all
// threads read.
__global__ void __launch_bounds__(kHistogramThreads)
    histogram_move_kernel(const __grid_constant__ HistogramCudaArgs args) {
  const int64_t j = int64_t{blockIdx.x} * kHistogramThreads + threadIdx.x;
  const HistogramRanges ranges(args);
  if (j >= args.bins || !ranges.changes) return;
  next_of(args)[j] = static_cast<float>(counts_of(args)[j]) +
                     moved_mass(args.histogram, ranges.old, ranges.now, args.bins, j);
}

// One block: nobody else reads the range that its first thread replaces.
__global__ void __launch_bounds__(kHistogramThreads)
    histogram_store_kernel(const __grid_constant__ HistogramCudaArgs args) {
  const HistogramRanges ranges(args);
  if (!ranges.changes) return;
  for (int64_t j = threadIdx.x; j < args.bins; j += kHistogramThreads) {
    args.histogram[j] = next_of(args)[j];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    *args.low = ranges.now.low;
    *args.high = ranges.now.high;
  }
}

template <typename T>
cudaError_t launch_count(const HistogramCudaArgs& args, cudaStream_t stream) {
  const int64_t runs = (args.n + kHistogramRun - 1) / kHistogramRun;
  const auto blocks = static_cast<unsigned>(runs < kHistogramBlocks ? runs : kHistogramBlocks);
  if (args.bins > kSharedBins) {
    return cuda::launch(histogram_count_kernel<T, false>, blocks, kHistogramThreads, 0, stream,
                        args);
  }
  return cuda::launch(histogram_count_kernel<T, true>, blocks, kHistogramThreads,
                      static_cast<size_t>(args.bins) * 4, stream, args);
}

}  // namespace

int64_t histogram_cuda_workspace(int64_t bins) {
  return bins * static_cast<int64_t>(sizeof(Count) + sizeof(float));
}

cudaError_t observe_histogram_cuda(const HistogramCudaArgs& args, cudaStream_t stream) {
  cudaError_t error =
      cudaMemsetAsync(args.workspace, 0, sizeof(Count) * static_cast<size_t>(args.bins), stream);
  if (error == cudaSuccess && args.n > 0) {  // the range grows without values too
    error = with_float_type(args.type,
                            [&](auto zero) { return launch_count<decltype(zero)>(args, stream); });
  }
  if (error != cudaSuccess) return error;
  const int64_t blocks = (args.bins + kHistogramThreads - 1) / kHistogramThreads;
  error = cuda::launch(histogram_move_kernel, static_cast<unsigned>(blocks), kHistogramThreads, 0,
                       stream, args);
  if (error != cudaSuccess) return error;
  return cuda::launch(histogram_store_kernel, 1u, kHistogramThreads, 0, stream, args);
}

}  // namespace qk
