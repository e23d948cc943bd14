#include "csrc/batch_norm/batch_norm.h"

#include "csrc/base/tree_sum.h"

namespace qk {
namespace {

// Output bytes above which the kernel stores past the caches.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// Values of the channels, one a column.
struct Columns {
  alignas(64) float values[kGridBlock];

  void fill(const NormWalk& walk, int64_t task, const float* channels) {
    const int64_t first = walk.first_channel(task), period = walk.distinct_channels(task);
    for (int64_t j = 0; j < walk.columns(task); ++j) values[j] = channels[first + j % period];
  }
};

// Several of them, made anew when a thread gets to other columns.
template <int kCount>
class ColumnSet {
 public:
  ColumnSet(const NormWalk& walk, const float* const (&sources)[kCount]) : walk_(walk) {
    for (int k = 0; k < kCount; ++k) sources_[k] = sources[k];
  }
  void prepare(int64_t task) {
    if (walk_.first_column(task) == column_) return;
    column_ = walk_.first_column(task);
    for (int k = 0; k < kCount; ++k) columns_[k].fill(walk_, task, sources_[k]);
  }
  const float* operator[](int k) const { return columns_[k].values; }  // kGridBlock apart

 private:
  const NormWalk& walk_;
  const float* sources_[kCount];
  Columns columns_[kCount];
  int64_t column_ = -1;
};

// The columns of one channel added in order; to[c] for each channel of the task.
void add_columns(const NormWalk& walk, int64_t task, const float* columns, double* to) {
  const int64_t period = walk.distinct_channels(task), n = walk.columns(task);
  for (int64_t c = 0; c < period; ++c) to[c] = 0;
  for (int64_t j = 0; j < n; j += period) {
    for (int64_t c = 0; c < period; ++c) to[c] += static_cast<double>(columns[j + c]);
  }
}

// Statistics leave in the workspace for each task: sum, square, low, high of its channels and
// whether there is a NaN.
constexpr int64_t kKept = 4;

int64_t kept_values(const NormWalk& walk) { return kKept * walk.width + 1; }

}  // namespace

NormKernels select_norm_kernels(CpuFeatures features) {
#define QK_NORM_KERNELS(need, isa)                                              \
  if (has_features(features, need)) {                                           \
    return {norm_statistics_##isa, norm_fake_quant_##isa, norm_backward_##isa}; \
  }
#include "csrc/batch_norm/kernels.inc"
#undef QK_NORM_KERNELS
  return {};
}

int64_t batch_statistics_workspace(int64_t rows, int64_t channels) {
  const NormWalk walk(rows, channels);
  return walk.tasks * kept_values(walk);
}

Extremes batch_statistics(const BatchStatisticsArgs& args, const Parallel& parallel) {
  const StatisticsKernel kernel = select_norm_kernels().statistics;
  const NormWalk walk(args.rows, args.channels);
  const int64_t kept = kept_values(walk), width = walk.width;
  parallel.for_each_range(walk.tasks, walk.elements / 8, [&](int64_t begin, int64_t end) {
    ColumnSet<1> origin(walk, {args.x});
    alignas(64) float sums[kKept][kGridBlock];
    for (int64_t task = end; task-- > begin;) {
      origin.prepare(task);
      for (int64_t j = 0; j < kGridBlock; ++j) {
        sums[0][j] = sums[1][j] = 0;
        sums[2][j] = kNormInfinity;
        sums[3][j] = -kNormInfinity;
      }
      bool nan = false;
      walk.for_each_part(task, [&](int64_t first, const NormRows& at) {
        nan |= kernel({at, args.x + first, origin[0], sums[0], sums[1], sums[2], sums[3]});
      });
      double* to = args.workspace + task * kept;
      add_columns(walk, task, sums[0], to);
      add_columns(walk, task, sums[1], to + width);
      const int64_t period = walk.distinct_channels(task);
      for (int64_t c = 0; c < period; ++c) {
        float low = sums[2][c], high = sums[3][c];
        for (int64_t j = c; j < walk.columns(task); j += period) {
          low = sums[2][j] < low ? sums[2][j] : low;
          high = sums[3][j] > high ? sums[3][j] : high;
        }
        to[2 * width + c] = low;
        to[3 * width + c] = high;
      }
      to[kKept * width] = nan;
    }
  });
  NormExtremes extremes;
  for (int64_t t = 0; t < walk.tasks; ++t) {
    extremes.nan |= args.workspace[t * kept + kKept * width] != 0;
  }
  for (int64_t c = 0; c < args.channels; ++c) {
    TreeSum sum, square;
    float low = kNormInfinity, high = -kNormInfinity;
    for (int64_t t = walk.first_task(c); t < walk.first_task(c) + walk.chunks; ++t) {
      const double* from = args.workspace + t * kept + c % kGridBlock;
      sum.add(from[0]);
      square.add(from[width]);
      const auto task_low = static_cast<float>(from[2 * width]);
      const auto task_high = static_cast<float>(from[3 * width]);
      low = task_low < low ? task_low : low;
      high = task_high > high ? task_high : high;
    }
    extremes.add(finish_statistics(args, c, sum.total(), square.total(), low, high));
  }
  return extremes.found();
}

void norm_fake_quant(const NormFakeQuantArgs& args, const Parallel& parallel) {
  const NormFakeQuantKernel kernel = select_norm_kernels().fake_quant;
  const NormWalk walk(args.rows, args.channels);
  const NormSteps grid = norm_steps(args.grid);
  const bool stream = walk.elements * 4 >= kStreamBytes;
  parallel.for_each_range(walk.tasks, walk.elements / 6, [&](int64_t begin, int64_t end) {
    ColumnSet<2> columns(walk, {args.factor, args.shift});
    for (int64_t task = begin; task < end; ++task) {
      columns.prepare(task);
      walk.for_each_part(task, [&](int64_t first, const NormRows& at) {
        kernel({.at = at,
                .x = args.x + first,
                .y = args.y + first,
                .codes = args.codes == nullptr ? nullptr : args.codes + first,
                .factor = columns[0],
                .shift = columns[1],
                .grid = grid,
                .stream = stream});
      });
    }
    stream_fence();
  });
}

int64_t norm_backward_workspace(int64_t rows, int64_t channels) {
  const NormWalk walk(rows, channels);
  return walk.tasks * kNormSums * walk.width + channels;
}

void norm_backward(const NormBackwardArgs& args, const Parallel& parallel) {
  const NormBackwardKernel kernel = select_norm_kernels().backward;
  const NormWalk walk(args.rows, args.channels);
  const int64_t width = walk.width, tasks = walk.tasks;
  const int sums = args.learned ? kNormSums : 2;
  float* slope = reinterpret_cast<float*>(args.workspace + tasks * kNormSums * width);
  float* offset = slope + args.channels;
  NormBackwardRun run{.at = {},
                      .grad = args.grad,
                      .x = args.x,
                      .out = nullptr,
                      .columns = nullptr,
                      .grid = norm_steps(args.learned ? args.grid : without_clamp(args.grid)),
                      .learned = args.learned,
                      .stream = args.out != args.grad && walk.elements * 4 >= kStreamBytes,
                      .sums = nullptr};
  parallel.for_each_range(tasks, walk.elements / 5, [&](int64_t begin, int64_t end) {
    ColumnSet<3> columns(walk, {args.factor, args.shift, args.mean});
    alignas(64) float totals[kNormSums * kGridBlock];
    for (int64_t task = end; task-- > begin;) {
      columns.prepare(task);
      for (float& total : totals) total = 0;
      walk.for_each_part(task, [&](int64_t first, const NormRows& at) {
        NormBackwardRun part = run;
        part.at = at;
        part.grad += first;
        part.x += first;
        part.columns = columns[0];
        part.sums = totals;
        kernel(part);
      });
      for (int s = 0; s < sums; ++s) {
        add_columns(walk, task, totals + s * kGridBlock,
                    args.workspace + (task * kNormSums + s) * width);
      }
    }
  });
  const auto rows = static_cast<double>(args.rows);
  TreeSum grid_sums[2];
  for (int64_t c = 0; c < args.channels; ++c) {
    TreeSum total[kNormSums];
    for (int64_t t = walk.first_task(c); t < walk.first_task(c) + walk.chunks; ++t) {
      const double* from = args.workspace + t * kNormSums * width + c % kGridBlock;
      for (int s = 0; s < sums; ++s) total[s].add(from[s * width]);
    }
    const NormChannelGradients found =
        finish_gradients(total[0].total(), total[1].total(), args.inv_std[c], args.factor[c], rows);
    args.weight[c] = found.weight;
    args.bias[c] = found.bias;
    slope[c] = found.slope;
    offset[c] = found.offset;
    if (args.learned) {
      for (int k = 0; k < 2; ++k) grid_sums[k].add(total[2 + k].total());
    }
  }
  if (args.learned) {
    *args.scale = finish_scale(grid_sums[0].total(), args.grad_factor);
    *args.zero_point = finish_zero_point(grid_sums[1].total(), args.grid.scale, args.grad_factor);
  }
  parallel.for_each_range(tasks, walk.elements / 5, [&](int64_t begin, int64_t end) {
    ColumnSet<5> columns(walk, {args.factor, args.shift, args.mean, slope, offset});
    for (int64_t task = begin; task < end; ++task) {
      columns.prepare(task);
      walk.for_each_part(task, [&](int64_t first, const NormRows& at) {
        NormBackwardRun part = run;
        part.at = at;
        part.grad += first;
        part.x += first;
        part.out = args.out + first;
        part.columns = columns[0];
        kernel(part);
      });
    }
    stream_fence();
  });
}

}  // namespace qk
