#include "csrc/dorefa/cuda.h"

#include "csrc/base/cuda_elementwise.cuh"
#include "csrc/base/float_types.h"
#include "csrc/fake_quant_backward/cuda_sums.cuh"
#include "csrc/observe/cuda.h"
#include "csrc/observe/cuda_extremes.cuh"

namespace qk {
namespace {

constexpr int kDorefaRunThreads = 256, kDorefaFinishThreads = 128, kGradientThreads = 512;

// What the weight's kernels keep in the workspace, and the extremes' own behind it.
struct DorefaScratch {
  float* extremes;      // low, high
  int64_t* non_finite;  // [2]
  float* part;          // of the gradient, through the maximum
  double* sums;         // a run
  double* levels;       // of their tree
  int32_t* ties;        // a run
  void* rest;

  QK_HD float largest() const {
    const float low = extremes[0], high = extremes[1];
    return -low > high ? -low : high;
  }
  QK_HD bool finite() const { return non_finite[0] + non_finite[1] == 0; }
};

int64_t runs_of(int64_t n) { return (n + kSumRun - 1) / kSumRun; }
int64_t whole_16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

DorefaScratch scratch_of(void* workspace, int64_t n) {
  auto* at = static_cast<uint8_t*>(workspace);
  const auto take = [&at](int64_t bytes) {
    uint8_t* mine = at;
    at += whole_16(bytes);
    return mine;
  };
  DorefaScratch s{};
  s.extremes = reinterpret_cast<float*>(take(8));
  s.non_finite = reinterpret_cast<int64_t*>(take(16));
  s.part = reinterpret_cast<float*>(take(4));
  s.sums = reinterpret_cast<double*>(take(runs_of(n) * 8));
  s.levels = reinterpret_cast<double*>(take(runs_of(n) * 8));
  s.ties = reinterpret_cast<int32_t*>(take(runs_of(n) * 4));
  s.rest = at;
  return s;
}

DenseGrid whole(int64_t n) { return {nullptr, nullptr, n, 1, 1}; }

QK_DEVICE DorefaWeight constants(const DorefaWeightCudaArgs& args, const DorefaScratch& scratch) {
  // Not finite: every output becomes NaN by the scale.
  const float scale = scratch.finite() ? args.scale[0] : bits_float(0x7fc00000u);
  return dorefa_constants(scratch.finite() ? scratch.largest() : 0.0f,
                          {scale, args.zero_point[0], args.qmin, args.qmax});
}

template <typename T>
struct DorefaForward {
  static constexpr int kPerThread = 16 / sizeof(T);
  DorefaWeightCudaArgs args;
  DorefaScratch scratch;

  bool aligned() const { return cuda::is_aligned(args.x, 16) && cuda::is_aligned(args.out, 16); }

  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    const auto from = cuda::load_vector<kCount>(static_cast<const T*>(args.x) + first);
    cuda::Vector<T, kCount> to;
    const DorefaWeightRun one{from.v, to.v, kCount, constants(args, scratch)};
#pragma unroll
    for (int i = 0; i < kCount; ++i) dorefa_weight_element<T>(one, i);
    cuda::store_vector(static_cast<T*>(args.out) + first, to);
  }
};

// The gradients of kCount elements without the maximum's part; their terms go to shared memory.
template <typename T, int kCount>
QK_DEVICE int32_t backward_elements(const DorefaWeightCudaArgs& args, const DorefaWeight& weight,
                                    float largest, int64_t from, uint32_t element) {
  const auto grad = cuda::load_vector<kCount>(static_cast<const T*>(args.grad) + from + element);
  const auto x = cuda::load_vector<kCount>(static_cast<const T*>(args.x) + from + element);
  cuda::Vector<T, kCount> to;
  const DorefaBackwardRun run{grad.v, x.v, to.v, kCount, weight, nullptr};
  int32_t ties = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float term = 0;
    dorefa_backward_element<T>(run, i, &term, 0.0f);
    cuda::shared_store_u32(cuda::shared_memory() + (element + i) * 4, float_bits(term));
    const float v = to_float(x.v[i]);
    ties += (v < 0 ? -v : v) == largest;
  }
  cuda::store_vector(static_cast<T*>(args.out) + from + element, to);
  return ties;
}

template <typename T>
QK_DEVICE bool run_is_aligned(const void* p, int64_t from) {
  return (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(from) * sizeof(T)) % 16 == 0;
}

// Block b: run b of kSumRun elements.
template <typename T>
__global__ void __launch_bounds__(kDorefaRunThreads)
    dorefa_run_kernel(const __grid_constant__ DorefaWeightCudaArgs args,
                      const __grid_constant__ DorefaScratch scratch) {
  constexpr uint32_t kVector = 16 / sizeof(T);
  const int64_t from = int64_t{blockIdx.x} * kSumRun;
  const auto n = static_cast<uint32_t>(args.n - from < kSumRun ? args.n - from : kSumRun);
  const DorefaWeight weight = constants(args, scratch);
  const float largest = scratch.largest();
  const bool aligned = run_is_aligned<T>(args.grad, from) && run_is_aligned<T>(args.x, from) &&
                       run_is_aligned<T>(args.out, from);
  const uint32_t vectors = aligned ? n / kVector * kVector : 0;
  int32_t ties = 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x * kVector; i < vectors; i += kDorefaRunThreads * kVector) {
    ties += backward_elements<T, kVector>(args, weight, largest, from, i);
  }
#pragma unroll 1
  for (uint32_t i = vectors + threadIdx.x; i < n; i += kDorefaRunThreads) {
    ties += backward_elements<T, 1>(args, weight, largest, from, i);
  }
  if (ties > 0) atomicAdd(scratch.ties + blockIdx.x, ties);
  __syncthreads();
  if (threadIdx.x >= cuda::kWarpSize) return;
  const double sum = cuda::sum_run(cuda::shared_memory(), threadIdx.x % kSumLanes, n);
  if (threadIdx.x == 0) scratch.sums[blockIdx.x] = sum;
}

// One block: the part of the gradient that goes through each maximum.
__global__ void __launch_bounds__(kDorefaFinishThreads)
    dorefa_part_kernel(const __grid_constant__ DorefaWeightCudaArgs args,
                       const __grid_constant__ DorefaScratch scratch, int64_t runs) {
  const double sum = cuda::tree_sum<kDorefaFinishThreads>(
      [&](int64_t j) { return scratch.sums[j]; }, runs, scratch.levels);
  if (threadIdx.x != 0) return;
  int64_t ties = 0;
#pragma unroll 1
  for (int64_t j = 0; j < runs; ++j) ties += scratch.ties[j];
  const DorefaWeight weight = constants(args, scratch);
  *scratch.part =
      static_cast<float>(sum * static_cast<double>(weight.inv_largest) / static_cast<double>(ties));
}

// Block b: the elements of run b that are the maximum.
template <typename T>
__global__ void __launch_bounds__(kDorefaRunThreads)
    dorefa_maximum_kernel(const __grid_constant__ DorefaWeightCudaArgs args,
                          const __grid_constant__ DorefaScratch scratch) {
  if (scratch.ties[blockIdx.x] == 0) return;
  const int64_t from = int64_t{blockIdx.x} * kSumRun;
  const int64_t end = args.n - from < kSumRun ? args.n : from + kSumRun;
  const DorefaWeight weight = constants(args, scratch);
  const float largest = scratch.largest(), part = *scratch.part;
#pragma unroll 1
  for (int64_t i = from + threadIdx.x; i < end; i += kDorefaRunThreads) {
    const float v = to_float(static_cast<const T*>(args.x)[i]);
    if ((v < 0 ? -v : v) != largest) continue;
    float ignored = 0;
    const DorefaBackwardRun run{args.grad, args.x, args.out, args.n, weight, nullptr};
    dorefa_backward_element<T>(run, i, &ignored, v < 0 ? -part : part);
  }
}

cudaError_t find_extremes(const DorefaWeightCudaArgs& args, const DorefaScratch& scratch,
                          cudaStream_t stream) {
  return minmax_cuda({.x = args.x,
                      .type = args.type,
                      .grid = whole(args.n),
                      .low = scratch.extremes,
                      .high = scratch.extremes + 1,
                      .non_finite = scratch.non_finite,
                      .workspace = scratch.rest},
                     stream);
}

template <typename T>
cudaError_t backward_of(const DorefaWeightCudaArgs& args, cudaStream_t stream) {
  const DorefaScratch scratch = scratch_of(args.workspace, args.n);
  const int64_t runs = runs_of(args.n);
  if (runs > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaError_t error = find_extremes(args, scratch, stream);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(scratch.ties, 0, static_cast<size_t>(runs) * 4, stream);
  }
  const auto blocks = static_cast<unsigned>(runs);
  if (error == cudaSuccess) {
    error = cuda::launch(dorefa_run_kernel<T>, blocks, kDorefaRunThreads, kSumRun * 4, stream, args,
                         scratch);
  }
  if (error == cudaSuccess) {
    error =
        cuda::launch(dorefa_part_kernel, 1u, kDorefaFinishThreads, 0, stream, args, scratch, runs);
  }
  if (error != cudaSuccess) return error;
  return cuda::launch(dorefa_maximum_kernel<T>, blocks, kDorefaRunThreads, 0, stream, args,
                      scratch);
}

template <typename T, int kCount>
QK_DEVICE void gradient_elements(const DorefaGradientRun& run, bool finite, bool zero, int64_t i) {
  auto v = cuda::load_vector<kCount>(static_cast<const T*>(run.grad) + i);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float g = finite && !zero ? dorefa_gradient_value(run, to_float(v.v[k]), i + k)
                    : finite        ? 0.0f
                                    : bits_float(0x7fc00000u);
    from_float(g, &v.v[k]);
  }
  cuda::store_vector(static_cast<T*>(run.out) + i, v);
}

// Block b: sample b.
template <typename T>
__global__ void __launch_bounds__(kGradientThreads)
    dorefa_gradient_kernel(const __grid_constant__ DorefaGradientCudaArgs args) {
  const int64_t first = int64_t{blockIdx.x} * args.inner;
  const T* grad = static_cast<const T*>(args.grad) + first;
  T* out = static_cast<T*>(args.out) + first;
  const auto found =
      cuda::join_block<kGradientThreads>(cuda::extremes_of<T, kGradientThreads>(grad, args.inner));
  const float largest = -found.low > found.high ? -found.low : found.high, twice = 2.0f * largest;
  const bool finite = found.nans + found.infinities == 0 && twice - twice == 0.0f;
  const float inv = 1.0f / twice;
  const bool zero = finite && inv - inv != 0.0f;  // or too small to divide by
  const auto seed = static_cast<uint64_t>(args.seed != nullptr ? *args.seed : args.seed_value);
  const DorefaGradientRun run{
      grad, out, args.inner, twice, inv, args.steps, noise_key(seed, blockIdx.x)};
  constexpr int kVector = 16 / sizeof(T);
  const bool aligned = run_is_aligned<T>(grad, 0) && run_is_aligned<T>(out, 0);
  const int64_t vectors = aligned ? args.inner / kVector * kVector : 0;
#pragma unroll 1
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < vectors; i += kGradientThreads * kVector) {
    gradient_elements<T, kVector>(run, finite, zero, i);
  }
#pragma unroll 1
  for (int64_t i = vectors + threadIdx.x; i < args.inner; i += kGradientThreads) {
    gradient_elements<T, 1>(run, finite, zero, i);
  }
}

template <typename T>
cudaError_t gradient_of(const DorefaGradientCudaArgs& args, cudaStream_t stream) {
  return cuda::launch(dorefa_gradient_kernel<T>, static_cast<unsigned>(args.rows), kGradientThreads,
                      cuda::kJoinBytes<kGradientThreads>, stream, args);
}

}  // namespace

int64_t dorefa_cuda_workspace(int64_t n) {
  return 3 * 16 + 2 * whole_16(runs_of(n) * 8) + whole_16(runs_of(n) * 4) +
         minmax_cuda_workspace(whole(n));
}

cudaError_t dorefa_weight_cuda(const DorefaWeightCudaArgs& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  const DorefaScratch scratch = scratch_of(args.workspace, args.n);
  if (const cudaError_t error = find_extremes(args, scratch, stream); error != cudaSuccess) {
    return error;
  }
  return with_float_type(args.type, [&](auto zero) {
    return cuda::launch_elementwise(DorefaForward<decltype(zero)>{args, scratch}, args.n, stream);
  });
}

cudaError_t dorefa_weight_backward_cuda(const DorefaWeightCudaArgs& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  return with_float_type(args.type,
                         [&](auto zero) { return backward_of<decltype(zero)>(args, stream); });
}

cudaError_t dorefa_gradient_cuda(const DorefaGradientCudaArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.inner == 0) return cudaSuccess;
  if (args.rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  return with_float_type(args.type,
                         [&](auto zero) { return gradient_of<decltype(zero)>(args, stream); });
}

}  // namespace qk
