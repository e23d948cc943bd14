#include "csrc/fake_quant_backward/cuda.h"

#include "csrc/base/float_types.h"
#include "csrc/fake_quant_backward/cuda_sums.cuh"
#include "csrc/quantize/cuda_grid.cuh"

namespace qk {
namespace {

constexpr int kRunThreads = 256, kFinishThreads = 128;

// Of the channel at hand.
struct Point {
  float inv_scale;
  int32_t zero_point;
};

// The gradient of one element, and its terms of both sums.
template <typename T>
QK_DEVICE T pass(const LsqBackwardCudaArgs& args, const Point& at, T grad, T x, float* scale_term,
                 float* zero_term) {
  const float v = to_float(x) * at.inv_scale, g = to_float(grad);
  const int32_t zp = at.zero_point;
  const bool passes = args.clips ? clip_passes(v, zp, args.qmin, args.qmax)
                                 : fake_quant_passes(v, zp, args.qmin, args.qmax);
  *scale_term = g * (args.clips ? clip_slope(v, zp, args.qmin, args.qmax)
                                : fake_quant_slope(v, zp, args.qmin, args.qmax));
  *zero_term = passes ? 0.0f : g;
  return passes ? grad : T{};
}

// A run's terms in shared memory: those of the scale, then, 16 banks further, those of the zero
// point.
constexpr uint32_t kSecondTerms = (kSumRun + kSumLanes) * 4;
constexpr uint32_t kTermBytes = kSecondTerms + kSumRun * 4;

template <typename T, int kCount>
QK_DEVICE void run_elements(const LsqBackwardCudaArgs& args, const Point& at, int64_t from,
                            uint32_t element) {
  auto grad = cuda::load_vector<kCount>(static_cast<const T*>(args.grad) + from + element);
  const auto x = cuda::load_vector<kCount>(static_cast<const T*>(args.x) + from + element);
  float terms[2][kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    grad.v[i] = pass(args, at, grad.v[i], x.v[i], &terms[0][i], &terms[1][i]);
  }
  cuda::store_vector(static_cast<T*>(args.out) + from + element, grad);
  const uint32_t to = cuda::shared_memory() + element * 4;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if constexpr (kCount == 1) {
      cuda::shared_store_u32(to + k * kSecondTerms, float_bits(terms[k][0]));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        cuda::shared_store_u128(to + k * kSecondTerms + i * 4,
                                uint4{float_bits(terms[k][i]), float_bits(terms[k][i + 1]),
                                      float_bits(terms[k][i + 2]), float_bits(terms[k][i + 3])});
      }
    }
  }
}

// Block b: run b, one of `pieces` of a row of grid.inner elements. Workspace: [run][2].
template <typename T>
__global__ void __launch_bounds__(kRunThreads, 4)
    lsq_run_kernel(const __grid_constant__ LsqBackwardCudaArgs args, uint32_t pieces) {
  constexpr uint32_t kVector = 16 / sizeof(T);
  const DenseGrid& grid = args.grid;
  const uint32_t row = blockIdx.x / pieces;
  const int64_t within = int64_t{blockIdx.x % pieces} * kSumRun;
  const int64_t from = row * grid.inner + within;
  const auto n =
      static_cast<uint32_t>(grid.inner - within < kSumRun ? grid.inner - within : kSumRun);
  const uint32_t c = row % static_cast<uint32_t>(grid.channels);
  const Point at{1.0f / grid.scale[c], grid.zero_point[c]};
  const auto place = [from](const void* p) {
    return reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(from) * sizeof(T);
  };
  const bool aligned = (place(args.grad) | place(args.x) | place(args.out)) % 16 == 0;
  const uint32_t vectors = aligned ? n / kVector * kVector : 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x * kVector; i < vectors; i += kRunThreads * kVector) {
    run_elements<T, kVector>(args, at, from, i);
  }
#pragma unroll 1
  for (uint32_t i = vectors + threadIdx.x; i < n; i += kRunThreads) {
    run_elements<T, 1>(args, at, from, i);
  }
  __syncthreads();
  if (threadIdx.x >= 2 * kSumLanes) return;
  const uint32_t lane = threadIdx.x % kSumLanes, which = threadIdx.x / kSumLanes;
  const double sum = cuda::sum_run(cuda::shared_memory() + which * kSecondTerms, lane, n);
  if (lane == 0) args.workspace[int64_t{blockIdx.x} * 2 + which] = sum;
}

// How rows of one element a channel are cut: detail::ChannelRows, as numbers.
struct ColumnTasks {
  int64_t rows, fold, row_elements, folded_rows, width, chunk, chunks;
};

// Block b: task b of detail::ChannelRows, a thread kVector columns. Workspace: [task][2][width].
template <typename T, int kVector>
__global__ void __launch_bounds__(kGridBlock / kVector)
    lsq_column_kernel(const __grid_constant__ LsqBackwardCudaArgs args,
                      const __grid_constant__ ColumnTasks tasks) {
  const DenseGrid& grid = args.grid;
  const int64_t first = blockIdx.x / tasks.chunks * kGridBlock;
  const int64_t first_row = blockIdx.x % tasks.chunks * tasks.chunk;
  const int64_t last_row =
      first_row + tasks.chunk < tasks.folded_rows ? first_row + tasks.chunk : tasks.folded_rows;
  const int64_t within = int64_t{threadIdx.x} * kVector, column = first + within;
  if (within >= tasks.width) return;
  float sums[2][kVector] = {};
  if (column < tasks.row_elements) {
    Point at[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const int64_t c = (column + k) % grid.channels;
      at[k] = {1.0f / grid.scale[c], grid.zero_point[c]};
    }
#pragma unroll 2
    for (int64_t row = first_row; row < last_row; ++row) {
      const int64_t i = row * tasks.row_elements + column;
      if (i >= grid.size) break;  // the last folded row may be short, by whole channels
      auto grad = cuda::load_vector<kVector>(static_cast<const T*>(args.grad) + i);
      const auto x = cuda::load_vector<kVector>(static_cast<const T*>(args.x) + i);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        float terms[2];
        grad.v[k] = pass(args, at[k], grad.v[k], x.v[k], &terms[0], &terms[1]);
        sums[0][k] += terms[0];
        sums[1][k] += terms[1];
      }
      cuda::store_vector(static_cast<T*>(args.out) + i, grad);
    }
  }
  double* partial = args.workspace + int64_t{blockIdx.x} * 2 * tasks.width + within;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    partial[k] = static_cast<double>(sums[0][k]);
    partial[tasks.width + k] = static_cast<double>(sums[1][k]);
  }
}

// Where the partial sums of a channel lie: number j of `count`.
struct Partials {
  int64_t count;
  // Runs: [outer][channel][pieces][2].
  int64_t pieces;
  // Columns: [task][2][width], `fold` of them a task; pieces is 0.
  int64_t fold, width, chunks;

  QK_DEVICE int64_t place(int64_t channels, int64_t c, int64_t j, int which) const {
    if (pieces > 0) return ((j / pieces * channels + c) * pieces + j % pieces) * 2 + which;
    const int64_t task = c / kGridBlock * chunks + j / fold;
    return (task * 2 + which) * width + c % kGridBlock + j % fold * channels;
  }
};

QK_DEVICE float finished(double sum) {
  return sum != sum ? bits_float(0x7fc00000u) : static_cast<float>(sum);
}

// The sum of the partial sums of channel c, on thread 0.
QK_DEVICE double channel_sum(const LsqBackwardCudaArgs& args, const Partials& partials, int64_t c,
                             int which, double* level) {
  const auto partial = [&](int64_t j) {
    return args.workspace[partials.place(args.grid.channels, c, j, which)];
  };
  return cuda::tree_sum<kFinishThreads>(partial, partials.count, level);
}

// Block c: channel c. `scratch`: [channel][2][count].
__global__ void __launch_bounds__(kFinishThreads)
    lsq_finish_kernel(const __grid_constant__ LsqBackwardCudaArgs args,
                      const __grid_constant__ Partials partials, double* scratch) {
  const int64_t c = blockIdx.x;
  double* level = scratch + c * 2 * partials.count;
  const double scale_sum = channel_sum(args, partials, c, 0, level);
  const double zero_sum = channel_sum(args, partials, c, 1, level + partials.count);
  if (threadIdx.x != 0) return;
  args.scale_grad[c] = finished(scale_sum * args.factor);
  args.zero_point_grad[c] =
      finished(-(zero_sum * static_cast<double>(args.grid.scale[c])) * args.factor);
}

struct RoundZeroPoint {
  static constexpr int kPerThread = 4;
  const float* learned;
  int32_t* zero_point;
  int32_t qmin, qmax;

  bool aligned() const { return cuda::is_aligned(learned, 16) && cuda::is_aligned(zero_point, 16); }
  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    const auto from = cuda::load_vector<kCount>(learned + first);
    cuda::Vector<int32_t, kCount> to;
#pragma unroll
    for (int i = 0; i < kCount; ++i) to.v[i] = round_zero_point(from.v[i], qmin, qmax);
    cuda::store_vector(zero_point + first, to);
  }
};

// The walk that the CPU takes over such a tensor.
GridLayout walk_of_columns(const DenseGrid& grid) {
  GridLayout layout;
  layout.strided.dims = 2;
  layout.strided.size[0] = grid.size / grid.channels;
  layout.strided.size[1] = grid.channels;
  for (auto& stride : layout.strided.stride) stride[0] = grid.channels, stride[1] = 1;
  layout.channel_dim = 1;
  return layout;
}

int64_t row_pieces(const DenseGrid& grid) { return (grid.inner + kSumRun - 1) / kSumRun; }

Partials partials_of(const DenseGrid& grid) {
  if (!grid.channel_is_innermost()) {
    const int64_t pieces = row_pieces(grid), outer = grid.size / (grid.channels * grid.inner);
    return {outer * pieces, pieces, 0, 0, 0};
  }
  const GridLayout walk = walk_of_columns(grid);
  const detail::ChannelRows plan(walk, kSumTask);
  return {plan.chunks * plan.fold, 0, plan.fold, plan.width, plan.chunks};
}

int64_t partial_elements(const DenseGrid& grid) {
  if (!grid.channel_is_innermost()) return grid.size / grid.inner * row_pieces(grid) * 2;
  const GridLayout walk = walk_of_columns(grid);
  const detail::ChannelRows plan(walk, kSumTask);
  return plan.tasks() * plan.width * 2;
}

template <typename T>
cudaError_t launch_sums(const LsqBackwardCudaArgs& args, cudaStream_t stream) {
  const DenseGrid& grid = args.grid;
  if (!grid.channel_is_innermost()) {
    const int64_t pieces = row_pieces(grid), runs = grid.size / grid.inner * pieces;
    if (runs > INT32_MAX) return cudaErrorInvalidConfiguration;
    return cuda::launch(lsq_run_kernel<T>, static_cast<unsigned>(runs), kRunThreads, kTermBytes,
                        stream, args, static_cast<uint32_t>(pieces));
  }
  const GridLayout walk = walk_of_columns(grid);
  const detail::ChannelRows plan(walk, kSumTask);
  const ColumnTasks tasks{plan.rows,  plan.fold,  plan.row_elements, plan.folded_rows,
                          plan.width, plan.chunk, plan.chunks};
  if (plan.tasks() > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto launch = [&](auto kernel, int vector) {
    return cuda::launch(kernel, static_cast<unsigned>(plan.tasks()),
                        static_cast<int>(kGridBlock) / vector, 0, stream, args, tasks);
  };
  constexpr int kVector = 16 / sizeof(T);
  const bool aligned = cuda::is_aligned(args.grad, 16) && cuda::is_aligned(args.x, 16) &&
                       cuda::is_aligned(args.out, 16);
  return aligned && grid.channels % kVector == 0 ? launch(lsq_column_kernel<T, kVector>, kVector)
                                                 : launch(lsq_column_kernel<T, 1>, 1);
}

}  // namespace

int64_t lsq_cuda_workspace(const DenseGrid& given) {
  const DenseGrid grid = given.in_rows();
  return grid.size == 0 ? 0 : partial_elements(grid) + partials_of(grid).count * 2 * grid.channels;
}

cudaError_t lsq_backward_cuda(const LsqBackwardCudaArgs& given, cudaStream_t stream) {
  LsqBackwardCudaArgs args = given;
  args.grid = given.grid.in_rows();
  if (args.grid.size == 0) {
    const size_t bytes = static_cast<size_t>(args.grid.channels) * sizeof(float);
    const cudaError_t error = cudaMemsetAsync(args.scale_grad, 0, bytes, stream);
    return error != cudaSuccess ? error : cudaMemsetAsync(args.zero_point_grad, 0, bytes, stream);
  }
  const cudaError_t error = with_float_type(
      args.type, [&](auto zero) { return launch_sums<decltype(zero)>(args, stream); });
  if (error != cudaSuccess) return error;
  return cuda::launch(lsq_finish_kernel, static_cast<unsigned>(args.grid.channels), kFinishThreads,
                      0, stream, args, partials_of(args.grid),
                      args.workspace + partial_elements(args.grid));
}

cudaError_t round_zero_points_cuda(const float* learned, int32_t* zero_point, int64_t n,
                                   int32_t qmin, int32_t qmax, cudaStream_t stream) {
  return cuda::launch_elementwise(RoundZeroPoint{learned, zero_point, qmin, qmax}, n, stream);
}

}  // namespace qk
