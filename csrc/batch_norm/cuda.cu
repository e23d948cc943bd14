#include "csrc/batch_norm/cuda.h"

#include "csrc/base/cuda_elementwise.cuh"

namespace qk {
namespace {

constexpr int kColumnThreads = static_cast<int>(kGridBlock);  // a thread a column of a task
constexpr int kChannelThreads = 128;                          // a warp a channel

// Sums in shared memory: [which][column of the task].
QK_DEVICE uint32_t column_place(int which, int64_t column) {
  return cuda::shared_memory() +
         (static_cast<uint32_t>(which) * kColumnThreads + static_cast<uint32_t>(column)) * 4;
}
constexpr size_t column_bytes(int sums) { return static_cast<size_t>(sums) * kColumnThreads * 4; }

// The column of this thread in the task of its block; the first block has the last task.
struct ThreadColumn {
  int64_t task, first;  // element
  int rows;             // that the column has, row_elements apart; 0 behind the last column
  int64_t channel;

  QK_DEVICE explicit ThreadColumn(const NormWalk& walk) : task(walk.tasks - 1 - blockIdx.x) {
    const int64_t begin = walk.first_row(task), last = walk.last_row(task);
    const int64_t column = walk.first_column(task) + threadIdx.x;
    first = begin * walk.row_elements + column;
    const bool is_short = (last - 1) * walk.row_elements + column >= walk.elements;
    rows = column < walk.row_elements ? static_cast<int>(last - begin) - is_short : 0;
    channel = walk.fold > 1 ? column % walk.channels : column;
  }
};

// The columns of channel c of the task, added in order.
QK_DEVICE double add_columns(int which, int64_t c, int64_t period, int64_t columns) {
  double sum = 0;
#pragma unroll 4
  for (int64_t j = c; j < columns; j += period) {
    sum += static_cast<double>(bits_float(cuda::shared_load_u32(column_place(which, j))));
  }
  return sum;
}

// The value of lane `from`.
template <typename T>
QK_DEVICE T of_lane(T value, uint32_t from) {
  return __shfl_xor_sync(cuda::kAllLanes, value,
                         static_cast<int>(threadIdx.x % cuda::kWarpSize ^ from));
}

// kSums sums over partial(which, 0) ... partial(which, count - 1) by the tree of TreeSum, on every
// lane; all lanes of the warp call it. 32 values make one of level 5; of those above, lane k keeps
// level k + 5.
template <int kSums, class Partial>
QK_DEVICE void tree_sums(const Partial& partial, uint32_t count, double (&total)[kSums]) {
  constexpr uint32_t kLanes = cuda::kWarpSize;
  const uint32_t lane = threadIdx.x % kLanes, wholes = count / kLanes, rest = count % kLanes;
  double level[kSums] = {}, value[kSums];
#pragma unroll 2
  for (uint32_t whole = 0; whole < wholes; ++whole) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) value[s] = partial(s, whole * kLanes + lane);
#pragma unroll
    for (uint32_t width = 1; width < kLanes; width *= 2) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        value[s] += __shfl_xor_sync(cuda::kAllLanes, value[s], static_cast<int>(width));
      }
    }
    uint32_t k = 0;
#pragma unroll 1
    for (; whole >> k & 1; ++k) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) value[s] = of_lane(level[s], k) + value[s];
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) level[s] = lane == k ? value[s] : level[s];
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    total[s] = 0;
    value[s] = lane < rest ? partial(s, wholes * kLanes + lane) : 0.0;
  }
  // Of the values that are left, level k begins where the higher levels end.
#pragma unroll
  for (uint32_t k = 0; 1u << k < kLanes; ++k) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const double here = of_lane(value[s], rest >> (k + 1) << (k + 1));
      if (rest >> k & 1) total[s] = here + total[s];
      value[s] += __shfl_xor_sync(cuda::kAllLanes, value[s], 1 << k);
    }
  }
#pragma unroll 1
  for (uint32_t k = 0; wholes >> k != 0; ++k) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const double here = of_lane(level[s], k);
      if (wholes >> k & 1) total[s] = here + total[s];
    }
  }
}

// The smallest and the largest of all lanes, on each.
QK_DEVICE void join_lanes(float* low, float* high) {
#pragma unroll
  for (int step = cuda::kWarpSize / 2; step > 0; step /= 2) {
    const float other_low = __shfl_xor_sync(cuda::kAllLanes, *low, step);
    const float other_high = __shfl_xor_sync(cuda::kAllLanes, *high, step);
    *low = other_low < *low ? other_low : *low;
    *high = other_high > *high ? other_high : *high;
  }
}

// ---- statistics ----

// Workspace: [task][sum, square, extremes (two floats)][width], then the ends of each channel.
constexpr int kStatistics = 3;
using FloatPair = cuda::Vector<float, 2>;

__global__ void __launch_bounds__(kColumnThreads, 2)
    norm_statistics_kernel(const __grid_constant__ BatchStatisticsArgs args,
                           const __grid_constant__ NormWalk walk) {
  const ThreadColumn at(walk);
  ColumnStatistics column{0, 0, kNormInfinity, -kNormInfinity};
  if (at.rows > 0) {
    const float origin = args.x[at.channel];
    const float* x = args.x + at.first;
#pragma unroll 16
    for (int r = 0; r < at.rows; ++r, x += walk.row_elements) column.add(*x, origin);
  }
  const float found[] = {column.sum, column.square, column.low, column.high};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    cuda::shared_store_u32(column_place(k, threadIdx.x), float_bits(found[k]));
  }
  __syncthreads();
  const int64_t c = threadIdx.x, period = walk.distinct_channels(at.task);
  if (c >= period) return;
  const int64_t columns = walk.columns(at.task);
  double* to = args.workspace + at.task * kStatistics * walk.width + c;
  to[0] = add_columns(0, c, period, columns);
  to[walk.width] = add_columns(1, c, period, columns);
  FloatPair ends{{kNormInfinity, -kNormInfinity}};
#pragma unroll 4
  for (int64_t j = c; j < columns; j += period) {
    const float low = bits_float(cuda::shared_load_u32(column_place(2, j)));
    const float high = bits_float(cuda::shared_load_u32(column_place(3, j)));
    ends.v[0] = low < ends.v[0] ? low : ends.v[0];
    ends.v[1] = high > ends.v[1] ? high : ends.v[1];
  }
  cuda::store_vector(reinterpret_cast<float*>(to + 2 * walk.width), ends);
}

QK_DEVICE int64_t warp_channel() {
  return (int64_t{blockIdx.x} * kChannelThreads + threadIdx.x) / cuda::kWarpSize;
}

__global__ void __launch_bounds__(kChannelThreads)
    norm_statistics_channel_kernel(const __grid_constant__ BatchStatisticsArgs args,
                                   const __grid_constant__ NormWalk walk, float* ends) {
  const int64_t c = warp_channel();
  if (c >= args.channels) return;
  const uint32_t lane = threadIdx.x % cuda::kWarpSize, chunks = static_cast<uint32_t>(walk.chunks);
  const int64_t stride = kStatistics * walk.width;
  const double* from = args.workspace + walk.first_task(c) * stride + c % kGridBlock;
  double total[2];
  tree_sums<2>([&](int which, uint32_t task) { return from[task * stride + which * walk.width]; },
               chunks, total);
  float low = kNormInfinity, high = -kNormInfinity;
#pragma unroll 2
  for (uint32_t task = lane; task < chunks; task += cuda::kWarpSize) {
    const FloatPair found =
        cuda::load_vector<2>(reinterpret_cast<const float*>(from + task * stride + 2 * walk.width));
    low = found.v[0] < low ? found.v[0] : low;
    high = found.v[1] > high ? found.v[1] : high;
  }
  join_lanes(&low, &high);
  if (lane != 0) return;
  const NormEnds found = finish_statistics(args, c, total[0], total[1], low, high);
  cuda::store_vector(ends + 2 * c, FloatPair{{found.value[0], found.value[1]}});
}

// One warp.
__global__ void __launch_bounds__(cuda::kWarpSize)
    norm_extremes_kernel(const float* ends, int64_t channels, float* extremes) {
  NormExtremes all;
#pragma unroll 4
  for (int64_t c = threadIdx.x; c < channels; c += cuda::kWarpSize) {
    const FloatPair found = cuda::load_vector<2>(ends + 2 * c);
    all.add({{found.v[0], found.v[1]}});
  }
  join_lanes(&all.low, &all.high);
  all.nan = __ballot_sync(cuda::kAllLanes, all.nan) != 0;
  if (threadIdx.x != 0) return;
  const Extremes found = all.found();
  extremes[0] = found.low;
  extremes[1] = found.high;
}

// ---- the grid ----

QK_DEVICE NormGrid grid_of(const NormCudaGrid& grid) {
  return {.scale = *grid.scale,
          .zero_point = grid.zero_point != nullptr
                            ? *grid.zero_point
                            : round_zero_point(*grid.learned_zero_point, grid.qmin, grid.qmax),
          .qmin = grid.qmin,
          .qmax = grid.qmax,
          .floor = grid.floor,
          .ceiling = grid.ceiling};
}

template <bool kLearned>
QK_DEVICE NormSteps backward_steps(const NormCudaGrid& at) {
  const NormGrid grid = grid_of(at);
  return norm_steps(kLearned ? grid : without_clamp(grid));
}

// ---- passes that write ----

constexpr int kVector = 4, kVectorRows = 4;
using Floats = cuda::Vector<float, kVector>;

// The matrix as rows of whole vectors, each some of its own rows and the last one perhaps short. A
// thread has one vector of columns, in kVectorRows rows.
struct VectorRows {
  int64_t elements, channels, row_elements;
  int64_t row_vectors, threads;
  bool aligned;           // all of the tensors to a vector of theirs
  bool channels_aligned;  // and what belongs to the channels too

  VectorRows(int64_t rows, int64_t channels) : elements(rows * channels), channels(channels) {
    constexpr int64_t kLeast = 128;  // elements that follow one another, for a warp
    const int64_t unit = channels % 4 == 0 ? 1 : channels % 2 == 0 ? 2 : 4;
    const int64_t units = (kLeast - 1) / (channels * unit) + 1;
    row_elements = channels * unit * units;
    row_vectors = row_elements / kVector;
    const int64_t wide_rows = (elements - 1) / row_elements + 1;
    threads = ((wide_rows - 1) / kVectorRows + 1) * row_vectors;
  }

  template <typename... T>
  void align(const T*... tensors) {
    aligned = (cuda::is_aligned(tensors, kVector * sizeof(T)) && ...);
  }
  template <typename... T>
  void align_channels(const T*... of) {
    channels_aligned = channels % kVector == 0 && (cuda::is_aligned(of, 16) && ...);
  }
};

// Where a thread is.
template <typename Index>
struct VectorPlace {
  const VectorRows& rows;
  int64_t first;  // element
  Index channel;

  QK_DEVICE VectorPlace(const VectorRows& rows, Index thread) : rows(rows) {
    const auto row_vectors = static_cast<Index>(rows.row_vectors);
    const Index column = thread % row_vectors * kVector;
    channel = column % static_cast<Index>(rows.channels);
    first = static_cast<int64_t>(thread / row_vectors) * kVectorRows * rows.row_elements +
            static_cast<int64_t>(column);
  }

  // What belongs to the channels of the four columns.
  QK_DEVICE Floats columns(const float* of) const {
    if (rows.channels_aligned) return cuda::load_vector<kVector>(of + channel);
    Floats values;
    Index c = channel;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      values.v[k] = of[c];
      if (++c == static_cast<Index>(rows.channels)) c = 0;
    }
    return values;
  }

  // Calls f.run<kCount, kRows>(element, column): kCount elements of kRows rows from `element` on,
  // the first of them in column `column` of the four. kTogether rows at once where all are there.
  template <int kTogether, class F>
  QK_DEVICE void for_each(const F& f) const {
    const int64_t last = first + (kVectorRows - 1) * rows.row_elements + kVector;
    if (rows.aligned && last <= rows.elements) {
#pragma unroll
      for (int r = 0; r < kVectorRows; r += kTogether) {
        f.template run<kVector, kTogether>(first + r * rows.row_elements, 0);
      }
      return;
    }
#pragma unroll 1
    for (int64_t i = first; i < last && i < rows.elements; i += rows.row_elements) {
      if (rows.aligned && i + kVector <= rows.elements) {
        f.template run<kVector, 1>(i, 0);
        continue;
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        if (i + k < rows.elements) f.template run<1, 1>(i + k, k);
      }
    }
  }
};

struct NormForward {
  static constexpr int kPerThread = 1;
  NormFakeQuantCudaArgs args;
  VectorRows rows;

  struct Columns {
    const NormFakeQuantCudaArgs& args;
    int64_t row_elements;
    NormSteps grid;
    Floats factor, shift;

    template <int kCount, int kRows>
    QK_DEVICE void run(int64_t element, int column) const {
      cuda::Vector<float, kCount> v[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        v[r] = cuda::load_vector<kCount>(args.x + element + r * row_elements);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = element + r * row_elements;
        cuda::Vector<uint8_t, kCount> codes;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const float t = fma(v[r].v[k], factor.v[column + k], shift.v[column + k]);
          const float offset = norm_offset(grid, t);
          v[r].v[k] = offset * grid.scale;
          codes.v[k] = norm_code(grid, offset);
        }
        cuda::store_vector(args.y + at, v[r]);
        if (args.codes != nullptr) cuda::store_vector(args.codes + at, codes);
      }
    }
  };

  bool aligned() const { return true; }
  template <int, typename Index>
  QK_DEVICE void run(Index thread) const {
    const VectorPlace<Index> at(rows, thread);
    at.template for_each<kVectorRows>(Columns{args, rows.row_elements,
                                              norm_steps(grid_of(args.grid)),
                                              at.columns(args.factor), at.columns(args.shift)});
  }
};

template <bool kLearned>
struct NormOut {
  static constexpr int kPerThread = 1;
  NormBackwardCudaArgs args;
  const float* slope;
  const float* offset;
  VectorRows rows;

  struct Columns {
    const NormBackwardCudaArgs& args;
    int64_t row_elements;
    NormSteps grid;
    Floats factor, shift, mean, slope, offset;

    template <int kCount, int kRows>
    QK_DEVICE void run(int64_t element, int column) const {
      cuda::Vector<float, kCount> grad[kRows], x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        grad[r] = cuda::load_vector<kCount>(args.grad + element + r * row_elements);
        x[r] = cuda::load_vector<kCount>(args.x + element + r * row_elements);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const int c = column + k;
          const float v = x[r].v[k];
          const float g =
              norm_terms<kLearned>(grid, grad[r].v[k], v, factor.v[c], shift.v[c], mean.v[c])
                  .value[0];
          grad[r].v[k] = norm_gradient(g, v, factor.v[c], mean.v[c], slope.v[c], offset.v[c]);
        }
        cuda::store_vector(args.out + element + r * row_elements, grad[r]);
      }
    }
  };

  bool aligned() const { return true; }
  template <int, typename Index>
  QK_DEVICE void run(Index thread) const {
    const VectorPlace<Index> at(rows, thread);
    at.template for_each<2>(Columns{args, rows.row_elements, backward_steps<kLearned>(args.grid),
                                    at.columns(args.factor), at.columns(args.shift),
                                    at.columns(args.mean), at.columns(slope), at.columns(offset)});
  }
};

// The index must reach the elements too.
template <class Op>
cudaError_t launch_vectors(const Op& op, cudaStream_t stream) {
  return op.rows.elements <= int64_t{1} << 31
             ? cuda::launch_elementwise_32(op, op.rows.threads, stream)
             : cuda::launch_elementwise_by<uint64_t>(op, op.rows.threads, stream);
}

// ---- sums of the backward ----

template <bool kLearned>
inline constexpr int kBackwardSums = kLearned ? kNormSums : 2;

// Workspace: [task][sum][width], then [2][channels] floats (slope, offset), then [2][channels]: the
// sums of a learned grid by channel.
template <bool kLearned>
__global__ void __launch_bounds__(kColumnThreads, 2)
    norm_sums_kernel(const __grid_constant__ NormBackwardCudaArgs args,
                     const __grid_constant__ NormWalk walk) {
  constexpr int kSums = kBackwardSums<kLearned>;
  const ThreadColumn at(walk);
  float sums[kSums] = {};
  if (at.rows > 0) {
    const NormSteps grid = backward_steps<kLearned>(args.grid);
    const float factor = args.factor[at.channel], shift = args.shift[at.channel];
    const float mean = args.mean[at.channel];
    const float *grad = args.grad + at.first, *x = args.x + at.first;
#pragma unroll 8
    for (int r = 0; r < at.rows; ++r) {
      const NormTerms terms = norm_terms<kLearned>(grid, *grad, *x, factor, shift, mean);
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s] += terms.value[s];
      grad += walk.row_elements;
      x += walk.row_elements;
    }
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    cuda::shared_store_u32(column_place(s, threadIdx.x), float_bits(sums[s]));
  }
  __syncthreads();
  const int64_t c = threadIdx.x, period = walk.distinct_channels(at.task);
  if (c >= period) return;
  double* to = args.workspace + at.task * kSums * walk.width + c;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    to[s * walk.width] = add_columns(s, c, period, walk.columns(at.task));
  }
}

// What the kernels of the backward leave behind the sums of tasks.
struct BackwardPlaces {
  float *slope, *offset;
  double* grid_sums;  // [2][channels]
};

template <bool kLearned>
__global__ void __launch_bounds__(kChannelThreads)
    norm_gradients_channel_kernel(const __grid_constant__ NormBackwardCudaArgs args,
                                  const __grid_constant__ NormWalk walk,
                                  const __grid_constant__ BackwardPlaces to) {
  constexpr int kSums = kBackwardSums<kLearned>;
  const int64_t c = warp_channel();
  if (c >= args.channels) return;
  const int64_t stride = kSums * walk.width;
  const double* from = args.workspace + walk.first_task(c) * stride + c % kGridBlock;
  double total[kSums];
  tree_sums<kSums>(
      [&](int which, uint32_t task) { return from[task * stride + which * walk.width]; },
      static_cast<uint32_t>(walk.chunks), total);
  if (threadIdx.x % cuda::kWarpSize != 0) return;
  const NormChannelGradients found = finish_gradients(
      total[0], total[1], args.inv_std[c], args.factor[c], static_cast<double>(args.rows));
  args.weight[c] = found.weight;
  args.bias[c] = found.bias;
  to.slope[c] = found.slope;
  to.offset[c] = found.offset;
  if constexpr (kLearned) {
    to.grid_sums[c] = total[2];
    to.grid_sums[args.channels + c] = total[3];
  }
}

// One warp.
__global__ void __launch_bounds__(cuda::kWarpSize)
    norm_grid_kernel(const __grid_constant__ NormBackwardCudaArgs args, const double* sums) {
  double total[2];
  tree_sums<2>([&](int which, uint32_t c) { return sums[which * args.channels + c]; },
               static_cast<uint32_t>(args.channels), total);
  if (threadIdx.x != 0) return;
  *args.scale = finish_scale(total[0], args.grad_factor);
  *args.zero_point = finish_zero_point(total[1], *args.grid.scale, args.grad_factor);
}

// A block a task, and 32 bits count the channels.
bool can_be_launched(const NormWalk& walk) {
  return walk.tasks <= INT32_MAX && walk.channels <= INT32_MAX;
}

unsigned channel_blocks(int64_t channels) {
  constexpr int64_t kPerBlock = kChannelThreads / cuda::kWarpSize;
  return static_cast<unsigned>((channels - 1) / kPerBlock + 1);
}

template <bool kLearned>
cudaError_t launch_backward(const NormBackwardCudaArgs& args, cudaStream_t stream) {
  const NormWalk walk(args.rows, args.channels);
  if (!can_be_launched(walk)) return cudaErrorInvalidConfiguration;
  constexpr int kSums = kBackwardSums<kLearned>;
  auto* slope = reinterpret_cast<float*>(args.workspace + walk.tasks * kSums * walk.width);
  float* offset = slope + args.channels;
  double* grid_sums = args.workspace + walk.tasks * kSums * walk.width + args.channels;
  cudaError_t error = cuda::launch(norm_sums_kernel<kLearned>, static_cast<unsigned>(walk.tasks),
                                   kColumnThreads, column_bytes(kSums), stream, args, walk);
  if (error != cudaSuccess) return error;
  error = cuda::launch(norm_gradients_channel_kernel<kLearned>, channel_blocks(args.channels),
                       kChannelThreads, 0, stream, args, walk,
                       BackwardPlaces{slope, offset, grid_sums});
  if (error != cudaSuccess) return error;
  if constexpr (kLearned) {
    error = cuda::launch(norm_grid_kernel, 1, cuda::kWarpSize, 0, stream, args,
                         static_cast<const double*>(grid_sums));
    if (error != cudaSuccess) return error;
  }
  NormOut<kLearned> op{args, slope, offset, VectorRows(args.rows, args.channels)};
  op.rows.align(args.grad, args.x, args.out);
  op.rows.align_channels(args.factor, args.shift, args.mean, slope, offset);
  return launch_vectors(op, stream);
}

}  // namespace

int64_t batch_statistics_cuda_workspace(int64_t rows, int64_t channels) {
  const NormWalk walk(rows, channels);
  return walk.tasks * kStatistics * walk.width + channels;
}

cudaError_t batch_statistics_cuda(const BatchStatisticsArgs& args, float* extremes,
                                  cudaStream_t stream) {
  const NormWalk walk(args.rows, args.channels);
  if (!can_be_launched(walk)) return cudaErrorInvalidConfiguration;
  auto* ends = reinterpret_cast<float*>(args.workspace + walk.tasks * kStatistics * walk.width);
  cudaError_t error = cuda::launch(norm_statistics_kernel, static_cast<unsigned>(walk.tasks),
                                   kColumnThreads, column_bytes(4), stream, args, walk);
  if (error != cudaSuccess) return error;
  error = cuda::launch(norm_statistics_channel_kernel, channel_blocks(args.channels),
                       kChannelThreads, 0, stream, args, walk, ends);
  if (error != cudaSuccess) return error;
  return cuda::launch(norm_extremes_kernel, 1, cuda::kWarpSize, 0, stream,
                      static_cast<const float*>(ends), args.channels, extremes);
}

cudaError_t norm_fake_quant_cuda(const NormFakeQuantCudaArgs& args, cudaStream_t stream) {
  NormForward op{args, VectorRows(args.rows, args.channels)};
  op.rows.align(args.x, args.y, args.codes);
  op.rows.align_channels(args.factor, args.shift);
  return launch_vectors(op, stream);
}

int64_t norm_backward_cuda_workspace(int64_t rows, int64_t channels) {
  const NormWalk walk(rows, channels);
  return walk.tasks * kNormSums * walk.width + 3 * channels;
}

cudaError_t norm_backward_cuda(const NormBackwardCudaArgs& args, cudaStream_t stream) {
  return args.learned ? launch_backward<true>(args, stream) : launch_backward<false>(args, stream);
}

}  // namespace qk
