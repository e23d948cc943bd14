#include "csrc/observe/cuda.h"

#include "csrc/base/cuda_elementwise.cuh"
#include "csrc/base/float_types.h"
#include "csrc/base/integers.h"
#include "csrc/observe/cuda_extremes.cuh"

namespace qk {
namespace {

constexpr int kObserveThreads = 256, kJoinThreads = 128;
constexpr int64_t kRun = 8192;        // elements of a block
constexpr int64_t kColumnRows = 256;  // rows of a block with the channel innermost

QK_DEVICE uint4 packed(const cuda::Extremes& e) {
  return {float_bits(e.low), float_bits(e.high), e.nans, e.infinities};
}
QK_DEVICE cuda::Extremes unpacked(const uint4& v) {
  cuda::Extremes e;
  e.low = bits_float(v.x), e.high = bits_float(v.y);
  e.nans = v.z, e.infinities = v.w;
  return e;
}

// Block b: a run of a row of grid.inner elements. Workspace: [outer][channel][pieces].
template <typename T>
__global__ void __launch_bounds__(kObserveThreads, 4)
    extremes_run_kernel(const __grid_constant__ MinMaxCudaArgs args, uint32_t pieces) {
  const int64_t row = blockIdx.x / pieces, within = int64_t{blockIdx.x % pieces} * kRun;
  const int64_t left = args.grid.inner - within;
  const auto found = cuda::join_block<kObserveThreads>(cuda::extremes_of<T, kObserveThreads>(
      static_cast<const T*>(args.x) + row * args.grid.inner + within, left < kRun ? left : kRun));
  if (threadIdx.x == 0)
    cuda::store_16(static_cast<uint4*>(args.workspace) + blockIdx.x, packed(found));
}

// Block b: kObserveThreads threads of kVector columns, one of `pieces` of a row, of kColumnRows
// rows. Workspace: [b / pieces][channel].
template <typename T, int kVector>
__global__ void __launch_bounds__(kObserveThreads, 4)
    extremes_column_kernel(const __grid_constant__ MinMaxCudaArgs args, uint32_t pieces) {
  const int64_t c = (int64_t{blockIdx.x % pieces} * kObserveThreads + threadIdx.x) * kVector,
                channels = args.grid.channels, chunk = blockIdx.x / pieces;
  if (c >= channels) return;
  const int64_t rows = args.grid.size / channels, first = chunk * kColumnRows;
  const int64_t last = first + kColumnRows < rows ? first + kColumnRows : rows;
  cuda::Extremes found[kVector];
#pragma unroll(16 / kVector)
  for (int64_t row = first; row < last; ++row) {
    const auto v = cuda::load_vector<kVector>(static_cast<const T*>(args.x) + row * channels + c);
#pragma unroll
    for (int k = 0; k < kVector; ++k) found[k].add(to_float(v.v[k]));
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    cuda::store_16(static_cast<uint4*>(args.workspace) + chunk * channels + c + k,
                   packed(found[k]));
  }
}

// Block c joins what was left for channel c: `below` neighbours, again and again.
__global__ void __launch_bounds__(kJoinThreads)
    extremes_join_kernel(const __grid_constant__ MinMaxCudaArgs args, int64_t count,
                         int64_t below) {
  cuda::Extremes mine;
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < count; j += kJoinThreads) {
    const int64_t at = (j / below * args.grid.channels + blockIdx.x) * below + j % below;
    mine.join(unpacked(cuda::load_16(static_cast<const uint4*>(args.workspace) + at)));
  }
  mine = cuda::join_block<kJoinThreads>(mine);
  if (threadIdx.x != 0) return;
  args.low[blockIdx.x] = mine.low + 0.0f;
  args.high[blockIdx.x] = mine.high + 0.0f;
  auto* totals = reinterpret_cast<unsigned long long*>(args.non_finite);
  if (mine.nans > 0) atomicAdd(totals, static_cast<unsigned long long>(mine.nans));
  if (mine.infinities > 0) {
    atomicAdd(totals + 1, static_cast<unsigned long long>(mine.infinities));
  }
}

QK_DEVICE bool inside(const ObserverStep& now, const GridRule& rule, float v) {
  return fake_quant_passes(v * (1.0f / now.scale), now.zero_point, rule.qmin, rule.qmax);
}

// A thread a channel.
__global__ void __launch_bounds__(kObserveThreads)
    observe_step_kernel(const __grid_constant__ ObserveCudaArgs args, const float* low,
                        const float* high, const int64_t* strange) {
  const int64_t c = int64_t{blockIdx.x} * kObserveThreads + threadIdx.x;
  if (c >= args.grid.channels) return;
  const bool finite = strange[0] + strange[1] == 0;
  if (!finite && args.clipped != nullptr) *args.clipped = true;
  if (!finite && args.non_finite == nullptr) return;
  const ObserverStep now =
      observer_step(args.rule, args.state.low[c], args.state.high[c], low[c], high[c]);
  args.state.low[c] = now.low;
  args.state.high[c] = now.high;
  args.state.scale[c] = now.scale;
  args.state.zero_point[c] = now.zero_point;
  const bool all_inside =
      inside(now, args.rule.rule, low[c]) && inside(now, args.rule.rule, high[c]);
  if (!all_inside && args.clipped != nullptr) *args.clipped = true;
  if (c == 0 && args.non_finite != nullptr) {
    args.non_finite[0] += strange[0];
    args.non_finite[1] += strange[1];
  }
}

// What is left for a channel in the workspace: `count` of them, `below` next to each other.
struct Left {
  int64_t count, below;
};

Left left_of(const DenseGrid& grid) {
  if (grid.size == 0) return {0, 1};
  if (grid.channel_is_innermost()) {
    return {(grid.size / grid.channels + kColumnRows - 1) / kColumnRows, 1};
  }
  const int64_t pieces = (grid.inner + kRun - 1) / kRun;
  return {grid.size / (grid.channels * grid.inner) * pieces, pieces};
}

template <typename T>
cudaError_t launch_extremes(const MinMaxCudaArgs& args, const Left& left, cudaStream_t stream) {
  const DenseGrid& grid = args.grid;
  if (grid.channel_is_innermost()) {
    const auto launch = [&](auto kernel, int64_t vector) {
      const int64_t columns = kObserveThreads * vector;
      const int64_t pieces = (grid.channels + columns - 1) / columns, blocks = pieces * left.count;
      if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
      return cuda::launch(kernel, static_cast<unsigned>(blocks), kObserveThreads, 0, stream, args,
                          static_cast<uint32_t>(pieces));
    };
    constexpr int kVector = 16 / sizeof(T);
    return grid.channels % kVector == 0 && cuda::is_aligned(args.x, 16)
               ? launch(extremes_column_kernel<T, kVector>, kVector)
               : launch(extremes_column_kernel<T, 1>, 1);
  }
  const int64_t blocks = left.count * grid.channels;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return cuda::launch(extremes_run_kernel<T>, static_cast<unsigned>(blocks), kObserveThreads,
                      cuda::kJoinBytes<kObserveThreads>, stream, args,
                      static_cast<uint32_t>(left.below));
}

}  // namespace

int64_t minmax_cuda_workspace(const DenseGrid& given) {
  const DenseGrid grid = given.in_rows();
  return left_of(grid).count * grid.channels * 16;
}

cudaError_t minmax_cuda(const MinMaxCudaArgs& given, cudaStream_t stream) {
  MinMaxCudaArgs args = given;
  args.grid = given.grid.in_rows();
  const Left left = left_of(args.grid);
  cudaError_t error = cudaMemsetAsync(args.non_finite, 0, 2 * sizeof(int64_t), stream);
  if (error == cudaSuccess && left.count > 0) {
    error = with_float_type(
        args.type, [&](auto zero) { return launch_extremes<decltype(zero)>(args, left, stream); });
  }
  if (error != cudaSuccess || args.grid.channels == 0) return error;
  return cuda::launch(extremes_join_kernel, static_cast<unsigned>(args.grid.channels), kJoinThreads,
                      cuda::kJoinBytes<kJoinThreads>, stream, args, left.count, left.below);
}

int64_t observe_cuda_workspace(const DenseGrid& grid) {
  return minmax_cuda_workspace(grid) + 16 + 2 * align_up(grid.channels * 4, 16);
}

cudaError_t observe_cuda(const ObserveCudaArgs& args, cudaStream_t stream) {
  if (args.clipped != nullptr) {
    const cudaError_t error = cudaMemsetAsync(args.clipped, 0, sizeof(bool), stream);
    if (error != cudaSuccess) return error;
  }
  if (args.grid.size == 0) return cudaSuccess;
  auto* strange = static_cast<int64_t*>(args.workspace);
  auto* low = reinterpret_cast<float*>(strange + 2);
  float* high = low + align_up(args.grid.channels * 4, 16) / 4;
  const cudaError_t error =
      minmax_cuda({.x = args.x,
                   .type = args.type,
                   .grid = args.grid,
                   .low = low,
                   .high = high,
                   .non_finite = strange,
                   .workspace = high + align_up(args.grid.channels * 4, 16) / 4},
                  stream);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (args.grid.channels + kObserveThreads - 1) / kObserveThreads;
  return cuda::launch(observe_step_kernel, static_cast<unsigned>(blocks), kObserveThreads, 0,
                      stream, args, static_cast<const float*>(low), static_cast<const float*>(high),
                      static_cast<const int64_t*>(strange));
}

}  // namespace qk
