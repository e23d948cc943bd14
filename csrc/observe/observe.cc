#include "csrc/observe/observe.h"

#include <limits>

#include "csrc/fake_quant/fake_quant.h"

namespace qk {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
// Elements of one task.
constexpr int64_t kMinMaxRun = 16384;
constexpr int64_t kMinMaxTask = 65536;
// Bytes of a row that is still in the cache after its extremes were found.
constexpr int64_t kHotRow = int64_t{512} << 10;

int64_t elements(const GridLayout& grid) { return grid.strided.rows() * grid.strided.inner(); }
int64_t pieces(const GridLayout& grid) {
  return (grid.strided.inner() + kMinMaxRun - 1) / kMinMaxRun;
}
bool channel_is_innermost(const GridLayout& grid) {
  return grid.channel_dim == grid.strided.dims - 1;
}

void widen(float low, float high, float* to_low, float* to_high) {
  if (low < *to_low || low != low) *to_low = low;  // NaN moves in; nothing is below it, so it stays
  if (high > *to_high) *to_high = high;
}

const char* address(const MinMaxArgs& args, int64_t offset) {
  return static_cast<const char*>(args.x) + offset * float_bytes(args.type);
}

// Channel innermost. Workspace: [task][2][width].
void minmax_channel_rows(const MinMaxArgs& args, const Parallel& parallel, MinMaxKernel kernel) {
  const detail::ChannelRows plan(args.grid, kMinMaxTask);
  const int64_t work_ns = elements(args.grid) / 8;
  parallel.for_each_range(plan.tasks(), work_ns, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      float* low = args.workspace + task * 2 * plan.width;
      float* high = low + plan.width;
      for (int64_t i = 0; i < plan.width; ++i) low[i] = kInf, high[i] = -kInf;
      bool nan = false;
      plan.for_each_row(task, [&](int64_t, int64_t offset, int64_t n) {
        nan |= kernel(
            {.x = address(args, offset), .n = n, .low = low, .high = high, .per_element = true});
      });
      if (nan) low[0] = std::numeric_limits<float>::quiet_NaN();
    }
  });
  for (int64_t task = 0; task < plan.tasks(); ++task) {
    const float* low = args.workspace + task * 2 * plan.width;
    for (int64_t i = 0; i < plan.columns(task); ++i) {
      const int64_t c = (plan.first_column(task) + i) % plan.channels;
      widen(low[i], low[plan.width + i], args.low + c, args.high + c);
    }
  }
}

// Workspace: [row][piece][2].
void minmax_runs(const MinMaxArgs& args, const Parallel& parallel, MinMaxKernel kernel) {
  const GridLayout& grid = args.grid;
  const StridedLayout<2>& in = grid.strided;
  const int64_t row_pieces = pieces(grid);
  const auto run = [&](const StridedCursor<2>& cursor, int64_t first, int64_t n) {
    float* partial = args.workspace + (cursor.row * row_pieces + first / kMinMaxRun) * 2;
    partial[0] = kInf;
    partial[1] = -kInf;
    const bool nan = kernel({.x = address(args, cursor.offset[1] + first),
                             .n = n,
                             .low = partial,
                             .high = partial + 1,
                             .per_element = false});
    if (nan) partial[0] = std::numeric_limits<float>::quiet_NaN();
  };
  for_each_run(in, parallel, kMinMaxRun, elements(grid) / 12, run);
  int64_t below = row_pieces;  // partials below one index of the channel
  for (int d = grid.channel_dim + 1; d + 1 < in.dims; ++d) below *= in.size[d];
  const int64_t total = in.rows() * row_pieces;
  for (int64_t k = 0; k < total; ++k) {
    const int64_t c = grid.channel_dim < 0 ? 0 : k / below % args.channels;
    widen(args.workspace[2 * k], args.workspace[2 * k + 1], args.low + c, args.high + c);
  }
}

// The channel of element i of the row that the cursor is at.
int64_t channel_at(const GridLayout& grid, const StridedCursor<2>& cursor, int64_t i) {
  if (grid.channel_dim < 0) return 0;
  return channel_is_innermost(grid) ? i : cursor.index[grid.channel_dim];
}

float value_at(const MinMaxArgs& args, int64_t offset) {
  const char* p = address(args, offset);
  switch (args.type) {
    case FloatType::kFloat32:
      return *reinterpret_cast<const float*>(p);
    case FloatType::kBFloat16:
      return to_float(*reinterpret_cast<const BFloat16*>(p));
    case FloatType::kFloat16:
      return to_float(*reinterpret_cast<const Float16*>(p));
  }
  return 0;
}

void reset(const MinMaxArgs& args) {
  for (int64_t c = 0; c < args.channels; ++c) args.low[c] = kInf, args.high[c] = -kInf;
}

void drop_negative_zeros(const MinMaxArgs& args) {
  for (int64_t c = 0; c < args.channels; ++c) args.low[c] += 0.0f, args.high[c] += 0.0f;
}

// The next state and grid of channel c, for the extremes of a batch.
void step(const ObserveArgs& args, int64_t c, float low, float high) {
  const ObserverStep now = observer_step({.rule = args.rule,
                                          .averages = args.averages,
                                          .momentum = args.momentum,
                                          .floor = args.floor,
                                          .ceiling = args.ceiling},
                                         args.state.low[c], args.state.high[c], low, high);
  args.next.low[c] = now.low;
  args.next.high[c] = now.high;
  args.next.scale[c] = now.scale;
  args.next.zero_point[c] = now.zero_point;
}

// Whether RNE(v / scale) lies on the new grid of channel c.
bool inside(const ObserveArgs& args, int64_t c, float v) {
  return fake_quant_passes(v * (1.0f / args.next.scale[c]), args.next.zero_point[c], args.rule.qmin,
                           args.rule.qmax);
}

// One contiguous row a channel: extremes, grid and output row by row. False if a row holds a NaN or
// an infinity.
bool observe_rows(const ObserveArgs& args, const MinMaxArgs& extremes, const Parallel& parallel) {
  const StridedLayout<2>& in = args.grid.strided;
  const MinMaxKernel kernel = select_minmax_kernel(args.type);
  const FakeQuantKernel fake_quant_kernel = select_fake_quant_kernel(args.type);
  const int64_t bytes = float_bytes(args.type), n = in.inner();
  parallel.for_each_range(args.channels, args.channels * n / 6, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float* low = extremes.low + c;
      float* high = extremes.high + c;
      const char* x = address(extremes, c * in.stride[1][0]);
      if (kernel({.x = x, .n = n, .low = low, .high = high, .per_element = false})) {
        *low = std::numeric_limits<float>::quiet_NaN();
      }
      if (!is_finite(*low) || !is_finite(*high)) return;
      step(args, c, *low, *high);
      const float inv_scale = 1.0f / args.next.scale[c];
      fake_quant_kernel({.x = x,
                         .y = static_cast<char*>(args.y) + c * in.stride[0][0] * bytes,
                         .n = n,
                         .grid = {args.next.scale + c, &inv_scale, args.next.zero_point + c, false},
                         .qmin = args.rule.qmin,
                         .qmax = args.rule.qmax,
                         .stream = false});
    }
  });
  for (int64_t c = 0; c < args.channels; ++c) {
    if (!is_finite(extremes.low[c]) || !is_finite(extremes.high[c])) return false;
  }
  return true;
}

bool has_hot_rows(const ObserveArgs& args) {
  const StridedLayout<2>& in = args.grid.strided;
  return args.y != nullptr && args.grid.channel_dim == 0 && in.dims == 2 &&
         in.inner() * float_bytes(args.type) <= kHotRow;
}

void commit(const ObserveArgs& args) {
  for (int64_t c = 0; c < args.channels; ++c) {
    args.state.low[c] = args.next.low[c];
    args.state.high[c] = args.next.high[c];
    args.state.scale[c] = args.next.scale[c];
    args.state.zero_point[c] = args.next.zero_point[c];
  }
}

}  // namespace

MinMaxKernel select_minmax_kernel(FloatType type, CpuFeatures features) {
#define QK_MINMAX_KERNEL(need, kernel_type, name) \
  if (type == kernel_type && has_features(features, need)) return name;
#include "csrc/observe/kernels.inc"
#undef QK_MINMAX_KERNEL
  return nullptr;
}

int64_t minmax_workspace(const GridLayout& grid) {
  if (elements(grid) == 0) return 0;
  if (!channel_is_innermost(grid)) return grid.strided.rows() * pieces(grid) * 2;
  const detail::ChannelRows plan(grid, kMinMaxTask);
  return plan.tasks() * plan.width * 2;
}

bool minmax(const MinMaxArgs& args, const Parallel& parallel) {
  reset(args);
  if (elements(args.grid) == 0) return true;
  const MinMaxKernel kernel = select_minmax_kernel(args.type);
  channel_is_innermost(args.grid) ? minmax_channel_rows(args, parallel, kernel)
                                  : minmax_runs(args, parallel, kernel);
  bool finite = true;
  for (int64_t c = 0; c < args.channels; ++c) {
    finite &= is_finite(args.low[c]) && is_finite(args.high[c]);
  }
  drop_negative_zeros(args);
  return finite;
}

NonFinite finite_minmax(const MinMaxArgs& args) {
  NonFinite found;
  reset(args);
  const auto run = [&](const StridedCursor<2>& cursor, int64_t, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const float v = value_at(args, cursor.offset[1] + i);
      const int64_t c = channel_at(args.grid, cursor, i);
      if (is_finite(v)) {
        widen(v, v, args.low + c, args.high + c);
      } else {
        ++(v != v ? found.nans : found.infinities);
      }
    }
  };
  if (elements(args.grid) > 0) for_each_run(args.grid.strided, kSerial, INT64_MAX / 2, 0, run);
  drop_negative_zeros(args);
  return found;
}

int64_t observe_workspace(const GridLayout& grid, int64_t channels) {
  return 2 * channels + minmax_workspace(grid);
}

Observed observe(const ObserveArgs& args, const Parallel& parallel) {
  const int64_t channels = args.channels;
  if (elements(args.grid) == 0) return {{}, false};
  const MinMaxArgs extremes{.x = args.x,
                            .type = args.type,
                            .grid = args.grid,
                            .channels = channels,
                            .low = args.workspace,
                            .high = args.workspace + channels,
                            .workspace = args.workspace + 2 * channels};
  Observed result;
  reset(extremes);
  const bool done = has_hot_rows(args) && observe_rows(args, extremes, parallel);
  if (!done) {
    if (!minmax(extremes, parallel)) {
      result.non_finite = finite_minmax(extremes);
      if (!args.ignore_non_finite) return result;
    }
    for (int64_t c = 0; c < channels; ++c) step(args, c, extremes.low[c], extremes.high[c]);
    if (args.y != nullptr) {
      GridLayout grid = args.grid;
      grid.scale = args.next.scale;
      grid.zero_point = args.next.zero_point;
      fake_quant({.x = args.x,
                  .y = args.y,
                  .type = args.type,
                  .qmin = args.rule.qmin,
                  .qmax = args.rule.qmax,
                  .grid = grid},
                 parallel);
    }
  }
  const NonFinite& strange = result.non_finite;
  result.clipped = strange.nans + strange.infinities > 0;
  for (int64_t c = 0; c < channels && !result.clipped; ++c) {
    result.clipped = !inside(args, c, extremes.low[c]) || !inside(args, c, extremes.high[c]);
  }
  commit(args);
  return result;
}

}  // namespace qk
