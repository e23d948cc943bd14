#include "csrc/batch_norm/batch_norm.h"

#include <cmath>

#include "csrc/base/tree_sum.h"

namespace qk {
namespace {

// Output bytes above which the kernel stores past the caches.
constexpr int64_t kStreamBytes = int64_t{32} << 20;
// Elements of a task: small enough for float32 sums of its columns, large beside their totals.
constexpr int64_t kTask = 65536;

GridLayout matrix(int64_t rows, int64_t channels) {
  GridLayout grid;
  grid.strided.dims = 2;
  grid.strided.size[0] = rows;
  grid.strided.size[1] = channels;
  for (auto& stride : grid.strided.stride) {
    stride[0] = channels;
    stride[1] = 1;
  }
  grid.channel_dim = 1;
  return grid;
}

// The matrix in tasks of some rows of at most kGridBlock columns, narrow rows folded.
struct Walk {
  GridLayout grid;
  detail::ChannelRows plan;
  int64_t width;  // distinct channels of a task

  Walk(int64_t rows, int64_t channels)
      : grid(matrix(rows, channels)),
        plan(grid, kTask),
        width(channels < kGridBlock ? channels : kGridBlock) {}
  Walk(const Walk&) = delete;

  int64_t elements() const { return plan.rows * plan.channels; }
  int64_t first_channel(int64_t task) const { return plan.fold > 1 ? 0 : plan.first_column(task); }
  int64_t channels(int64_t task) const {
    return plan.fold > 1 ? plan.channels : plan.columns(task);
  }
  // Task t of channel c is first_task(c) + t.
  int64_t first_task(int64_t c) const { return c / kGridBlock * plan.chunks; }

  // f(first element, NormRows), at most twice.
  template <typename F>
  void for_each_part(int64_t task, const F& f) const {
    const int64_t first_row = task % plan.chunks * plan.chunk, n = plan.columns(task);
    const int64_t last_row =
        first_row + plan.chunk < plan.folded_rows ? first_row + plan.chunk : plan.folded_rows;
    const int64_t complete = elements() / plan.row_elements;  // folded rows
    const int64_t end = last_row < complete ? last_row : complete;
    const int64_t first = first_row * plan.row_elements + plan.first_column(task);
    if (end > first_row) f(first, NormRows{plan.row_elements, end - first_row, n});
    if (last_row > complete) {
      f(complete * plan.row_elements,
        NormRows{plan.row_elements, 1, elements() % plan.row_elements});
    }
  }
};

// Values of the channels, one a column.
struct Columns {
  alignas(64) float values[kGridBlock];

  void fill(const Walk& walk, int64_t task, const float* channels) {
    const int64_t first = walk.first_channel(task), period = walk.channels(task);
    for (int64_t j = 0; j < walk.plan.columns(task); ++j) values[j] = channels[first + j % period];
  }
};

// Several of them, made anew when a thread gets to other columns.
template <int kCount>
class ColumnSet {
 public:
  ColumnSet(const Walk& walk, const float* const (&sources)[kCount]) : walk_(walk) {
    for (int k = 0; k < kCount; ++k) sources_[k] = sources[k];
  }
  void prepare(int64_t task) {
    if (walk_.plan.first_column(task) == column_) return;
    column_ = walk_.plan.first_column(task);
    for (int k = 0; k < kCount; ++k) columns_[k].fill(walk_, task, sources_[k]);
  }
  const float* operator[](int k) const { return columns_[k].values; }  // kGridBlock apart

 private:
  const Walk& walk_;
  const float* sources_[kCount];
  Columns columns_[kCount];
  int64_t column_ = -1;
};

// The columns of one channel added in order; to[c] for each channel of the task.
void add_columns(const Walk& walk, int64_t task, const float* columns, double* to) {
  const int64_t period = walk.channels(task), n = walk.plan.columns(task);
  for (int64_t c = 0; c < period; ++c) to[c] = 0;
  for (int64_t j = 0; j < n; j += period) {
    for (int64_t c = 0; c < period; ++c) to[c] += static_cast<double>(columns[j + c]);
  }
}

NormSteps steps_of(const NormGrid& grid) {
  return {.scale = grid.scale,
          .inv_scale = 1.0f / grid.scale,
          .lo = static_cast<float>(grid.qmin - grid.zero_point),
          .hi = static_cast<float>(grid.qmax - grid.zero_point),
          .zero_point = static_cast<float>(grid.zero_point),
          .floor = grid.floor,
          .ceiling = grid.ceiling};
}

float as_float(double sum) {
  return sum != sum ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(sum);
}

// Statistics leave in the workspace for each task: sum, square, low, high of its channels and
// whether there is a NaN.
constexpr int64_t kKept = 4;

int64_t kept_values(const Walk& walk) { return kKept * walk.width + 1; }

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
  const Walk walk(rows, channels);
  return walk.plan.tasks() * kept_values(walk);
}

Extremes batch_statistics(const BatchStatisticsArgs& args, const Parallel& parallel) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const StatisticsKernel kernel = select_norm_kernels().statistics;
  const Walk walk(args.rows, args.channels);
  const int64_t kept = kept_values(walk), width = walk.width;
  parallel.for_each_range(walk.plan.tasks(), walk.elements() / 8, [&](int64_t begin, int64_t end) {
    ColumnSet<1> origin(walk, {args.x});
    alignas(64) float sums[kKept][kGridBlock];
    for (int64_t task = end; task-- > begin;) {
      origin.prepare(task);
      for (int64_t j = 0; j < kGridBlock; ++j) {
        sums[0][j] = sums[1][j] = 0;
        sums[2][j] = kInfinity;
        sums[3][j] = -kInfinity;
      }
      bool nan = false;
      walk.for_each_part(task, [&](int64_t first, const NormRows& at) {
        nan |= kernel({at, args.x + first, origin[0], sums[0], sums[1], sums[2], sums[3]});
      });
      double* to = args.workspace + task * kept;
      add_columns(walk, task, sums[0], to);
      add_columns(walk, task, sums[1], to + width);
      const int64_t period = walk.channels(task);
      for (int64_t c = 0; c < period; ++c) {
        float low = sums[2][c], high = sums[3][c];
        for (int64_t j = c; j < walk.plan.columns(task); j += period) {
          low = sums[2][j] < low ? sums[2][j] : low;
          high = sums[3][j] > high ? sums[3][j] : high;
        }
        to[2 * width + c] = low;
        to[3 * width + c] = high;
      }
      to[kKept * width] = nan;
    }
  });
  const auto rows = static_cast<double>(args.rows);
  Extremes extremes{kInfinity, -kInfinity};
  bool nan = false;
  for (int64_t t = 0; t < walk.plan.tasks(); ++t)
    nan |= args.workspace[t * kept + kKept * width] != 0;
  for (int64_t c = 0; c < args.channels; ++c) {
    TreeSum sum, square;
    double low = kInfinity, high = -kInfinity;
    for (int64_t t = walk.first_task(c); t < walk.first_task(c) + walk.plan.chunks; ++t) {
      const double* from = args.workspace + t * kept + c % kGridBlock;
      sum.add(from[0]);
      square.add(from[width]);
      low = from[2 * width] < low ? from[2 * width] : low;
      high = from[3 * width] > high ? from[3 * width] : high;
    }
    const double difference = sum.total() / rows,
                 mean = static_cast<double>(args.x[c]) + difference;
    const double spread = square.total() / rows - difference * difference;
    const double variance = spread > 0 || spread != spread ? spread : 0;
    const double inv_std = 1.0 / std::sqrt(variance + args.eps);
    args.mean[c] = as_float(mean);
    args.inv_std[c] = as_float(inv_std);
    args.factor[c] = args.inv_std[c] * (args.weight == nullptr ? 1.0f : args.weight[c]);
    const double bias = args.bias == nullptr ? 0.0 : static_cast<double>(args.bias[c]);
    args.shift[c] = as_float(bias - mean * static_cast<double>(args.factor[c]));
    const auto follow = [&](float* running, double batch) {
      const auto old = static_cast<double>(running[c]);
      running[c] = as_float(old + args.momentum * (batch - old));
    };
    follow(args.running_mean, mean);
    follow(args.running_var, variance * (rows / (rows - 1)));
    const float ends[2] = {fma(static_cast<float>(low), args.factor[c], args.shift[c]),
                           fma(static_cast<float>(high), args.factor[c], args.shift[c])};
    for (float end : ends) {
      nan |= end != end;
      extremes.low = end < extremes.low ? end : extremes.low;
      extremes.high = end > extremes.high ? end : extremes.high;
    }
  }
  if (nan) extremes.low = extremes.high = std::numeric_limits<float>::quiet_NaN();
  return extremes;
}

void norm_fake_quant(const NormFakeQuantArgs& args, const Parallel& parallel) {
  const NormFakeQuantKernel kernel = select_norm_kernels().fake_quant;
  const Walk walk(args.rows, args.channels);
  const NormSteps grid = steps_of(args.grid);
  const bool stream = walk.elements() * 4 >= kStreamBytes;
  parallel.for_each_range(walk.plan.tasks(), walk.elements() / 6, [&](int64_t begin, int64_t end) {
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
  const Walk walk(rows, channels);
  return walk.plan.tasks() * kNormSums * walk.width + channels;
}

void norm_backward(const NormBackwardArgs& args, const Parallel& parallel) {
  const NormBackwardKernel kernel = select_norm_kernels().backward;
  const Walk walk(args.rows, args.channels);
  const int64_t width = walk.width, tasks = walk.plan.tasks();
  const int sums = args.learned ? kNormSums : 2;
  float* slope = reinterpret_cast<float*>(args.workspace + tasks * kNormSums * width);
  float* offset = slope + args.channels;
  NormBackwardRun run{.at = {},
                      .grad = args.grad,
                      .x = args.x,
                      .out = nullptr,
                      .columns = nullptr,
                      .grid = steps_of(args.grid),
                      .learned = args.learned,
                      .stream = args.out != args.grad && walk.elements() * 4 >= kStreamBytes,
                      .sums = nullptr};
  parallel.for_each_range(tasks, walk.elements() / 5, [&](int64_t begin, int64_t end) {
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
    for (int64_t t = walk.first_task(c); t < walk.first_task(c) + walk.plan.chunks; ++t) {
      const double* from = args.workspace + t * kNormSums * width + c % kGridBlock;
      for (int s = 0; s < sums; ++s) total[s].add(from[s * width]);
    }
    const double bias = total[0].total(), product = total[1].total();
    const auto inv_std = static_cast<double>(args.inv_std[c]);
    const auto factor = static_cast<double>(args.factor[c]);
    args.bias[c] = as_float(bias);
    args.weight[c] = as_float(product * inv_std);
    slope[c] = as_float(-factor * inv_std * inv_std * product / rows);
    offset[c] = as_float(-factor * bias / rows);
    if (args.learned) {
      for (int k = 0; k < 2; ++k) grid_sums[k].add(total[2 + k].total());
    }
  }
  if (args.learned) {
    *args.scale = as_float(grid_sums[0].total() * args.grad_factor);
    *args.zero_point =
        as_float(-(grid_sums[1].total() * static_cast<double>(args.grid.scale)) * args.grad_factor);
  }
  parallel.for_each_range(tasks, walk.elements() / 5, [&](int64_t begin, int64_t end) {
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
