#include "csrc/fake_quant_backward/backward.h"

#include <limits>

#include "csrc/base/tree_sum.h"

namespace qk {
namespace {

// Output bytes above which the kernel stores past the caches.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

int64_t elements(const GridLayout& grid) { return grid.strided.rows() * grid.strided.inner(); }
bool channel_is_innermost(const GridLayout& grid) {
  return grid.channel_dim == grid.strided.dims - 1;
}
int64_t pieces(const GridLayout& grid) { return (grid.strided.inner() + kSumRun - 1) / kSumRun; }

// Makes runs of `args`, for a kernel.
struct RunMaker {
  const FakeQuantBackwardArgs& args;
  int64_t bytes = float_bytes(args.type);
  bool stream =
      args.out != args.grad && args.out != args.x && elements(args.grid) * bytes >= kStreamBytes;

  FakeQuantBackwardRun operator()(int64_t out_offset, int64_t x_offset, int64_t n,
                                  const GridSpan& span) const {
    return {.grad = static_cast<const char*>(args.grad) + out_offset * bytes,
            .x = static_cast<const char*>(args.x) + x_offset * bytes,
            .out = static_cast<char*>(args.out) + out_offset * bytes,
            .n = n,
            .grid = span,
            .qmin = args.qmin,
            .qmax = args.qmax,
            .stream = stream,
            .clips = args.clips,
            .partial = nullptr,
            .columns = nullptr};
  }
};

float finished(double sum) {
  return sum != sum ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(sum);
}

void store_sums(const FakeQuantBackwardArgs& args, const LsqSums& sums, int64_t c, double scale_sum,
                double zero_sum) {
  const double scale = static_cast<double>(args.grid.scale[c]);
  sums.scale[c] = finished(scale_sum * sums.factor);
  sums.zero_point[c] = finished(-(zero_sum * scale) * sums.factor);
}

// Channel innermost. Workspace: [task][2][width].
void lsq_channel_rows(const FakeQuantBackwardArgs& args, const LsqSums& sums,
                      const Parallel& parallel, FakeQuantBackwardKernel kernel) {
  const RunMaker make_run{args};
  const detail::ChannelRows plan(args.grid, kSumTask);
  const auto task = [&](int64_t index, const GridSpan& span) {
    alignas(64) float columns[2 * kGridBlock] = {};
    int64_t waiting[3];  // the row before: offsets and length
    bool waits = false;
    const auto run_rows = [&](int64_t out_offset, int64_t x_offset, int64_t n) {
      FakeQuantBackwardRun run = make_run(waiting[0], waiting[1], waiting[2], span);
      run.columns = columns;
      if (n == waiting[2]) {
        run.rows = 2;
        run.out_step = out_offset - waiting[0];
        run.x_step = x_offset - waiting[1];
      }
      kernel(run);
      return run.rows == 2;
    };
    plan.for_each_row(index, [&](int64_t out_offset, int64_t x_offset, int64_t n) {
      if (waits && run_rows(out_offset, x_offset, n)) {
        waits = false;
        return;
      }
      waiting[0] = out_offset;
      waiting[1] = x_offset;
      waiting[2] = n;
      waits = true;
    });
    if (waits) run_rows(0, 0, -1);
    double* partial = sums.workspace + index * 2 * plan.width;
    for (int64_t i = 0; i < plan.width; ++i) {
      partial[i] = static_cast<double>(columns[i]);
      partial[plan.width + i] = static_cast<double>(columns[kGridBlock + i]);
    }
  };
  detail::for_each_channel_task(plan, parallel, elements(args.grid) / 6, task, stream_fence);
  for (int64_t c = 0; c < sums.channels; c += TreeSums::kCount) {
    const int64_t first_task = c / kGridBlock * plan.chunks, column = c % kGridBlock;
    const int64_t left = sums.channels - c, n = left < TreeSums::kCount ? left : TreeSums::kCount;
    TreeSums sum[2];
    for (int64_t t = first_task; t < first_task + plan.chunks; ++t) {
      const double* partial = sums.workspace + t * 2 * plan.width + column;
      for (int64_t k = 0; k < plan.fold; ++k, partial += plan.channels) {
        sum[0].add(partial, n);
        sum[1].add(partial + plan.width, n);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      store_sums(args, sums, c + i, sum[0].total(i), sum[1].total(i));
    }
  }
}

// Workspace: [row][piece][2].
void lsq_runs(const FakeQuantBackwardArgs& args, const LsqSums& sums, const Parallel& parallel,
              FakeQuantBackwardKernel kernel) {
  const GridLayout& grid = args.grid;
  const StridedLayout<2>& in = grid.strided;
  const RunMaker make_run{args};
  const int64_t row_pieces = pieces(grid);
  const auto run = [&](const StridedCursor<2>& cursor, int64_t first, int64_t n) {
    const int64_t c = grid.channel_dim < 0 ? 0 : cursor.index[grid.channel_dim];
    const float inv_scale = 1.0f / grid.scale[c];
    const GridSpan span{grid.scale + c, &inv_scale, grid.zero_point + c, false};
    FakeQuantBackwardRun part =
        make_run(cursor.offset[0] + first, cursor.offset[1] + first, n, span);
    part.partial = sums.workspace + (cursor.row * row_pieces + first / kSumRun) * 2;
    kernel(part);
  };
  for_each_run(in, parallel, kSumRun, elements(grid) / 6, run, stream_fence);
  int64_t outer = 1, below = row_pieces;  // partials below one index of the channel
  for (int d = 0; d < grid.channel_dim; ++d) outer *= in.size[d];
  for (int d = grid.channel_dim + 1; d + 1 < in.dims; ++d) below *= in.size[d];
  for (int64_t c = 0; c < sums.channels; ++c) {
    TreeSum sum[2];
    for (int64_t o = 0; o < outer; ++o) {
      const double* partial = sums.workspace + (o * sums.channels + c) * below * 2;
      for (int64_t k = 0; k < below; ++k) {
        sum[0].add(partial[2 * k]);
        sum[1].add(partial[2 * k + 1]);
      }
    }
    store_sums(args, sums, c, sum[0].total(), sum[1].total());
  }
}

}  // namespace

FakeQuantBackwardKernel select_fake_quant_backward_kernel(FloatType type, CpuFeatures features) {
#define QK_FAKE_QUANT_BACKWARD_KERNEL(need, kernel_type, name) \
  if (type == kernel_type && has_features(features, need)) return name;
#include "csrc/fake_quant_backward/kernels.inc"
#undef QK_FAKE_QUANT_BACKWARD_KERNEL
  return nullptr;
}

void fake_quant_backward(const FakeQuantBackwardArgs& args, const Parallel& parallel) {
  const FakeQuantBackwardKernel kernel = select_fake_quant_backward_kernel(args.type);
  const RunMaker make_run{args};
  for_each_grid_run(
      args.grid, parallel,
      [&](int64_t out_offset, int64_t x_offset, int64_t n, const GridSpan& span) {
        kernel(make_run(out_offset, x_offset, n, span));
      },
      stream_fence);
}

int64_t lsq_workspace(const GridLayout& grid) {
  if (elements(grid) == 0) return 0;
  if (!channel_is_innermost(grid)) return grid.strided.rows() * pieces(grid) * 2;
  const detail::ChannelRows plan(grid, kSumTask);
  return plan.tasks() * plan.width * 2;
}

void lsq_backward(const FakeQuantBackwardArgs& args, const LsqSums& sums,
                  const Parallel& parallel) {
  const FakeQuantBackwardKernel kernel = select_fake_quant_backward_kernel(args.type);
  if (elements(args.grid) == 0) {
    for (int64_t c = 0; c < sums.channels; ++c) sums.scale[c] = sums.zero_point[c] = 0;
  } else if (channel_is_innermost(args.grid)) {
    lsq_channel_rows(args, sums, parallel, kernel);
  } else {
    lsq_runs(args, sums, parallel, kernel);
  }
}

void round_zero_points(const float* learned, int32_t* zero_point, int64_t n, int32_t qmin,
                       int32_t qmax) {
  for (int64_t i = 0; i < n; ++i) zero_point[i] = round_zero_point(learned[i], qmin, qmax);
}

}  // namespace qk
