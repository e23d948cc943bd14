// How the passes of batch_norm.h cut the matrix [rows, channels], on the CPU and on CUDA: tasks of
// some rows of at most kGridBlock columns, as detail::ChannelRows plans them, narrow rows folded.
// The bits of the sums follow from it.
#pragma once

#include <cstdint>

#include "csrc/base/numerics.h"
#include "csrc/quantize/grid.h"

namespace qk {

// Elements of a task: small enough for float32 sums of its columns, large beside their totals.
inline constexpr int64_t kNormTask = 65536;

// What a kernel sees: some rows of n columns (at most kGridBlock), `stride` elements apart, and
// what belongs to each column. A column is a channel, or one of several of it where rows are
// folded.
struct NormRows {
  int64_t stride, rows, n;
};

struct NormWalk {
  int64_t elements, channels;
  int64_t fold, row_elements, folded_rows;
  int64_t chunk, chunks;  // folded rows of a task, and how many tasks they make
  int64_t tasks;
  int64_t width;  // distinct channels of a task, at most

  NormWalk(int64_t rows, int64_t channels) : elements(rows * channels), channels(channels) {
    GridLayout layout;
    layout.strided.dims = 2;
    layout.strided.size[0] = rows;
    layout.strided.size[1] = channels;
    for (auto& stride : layout.strided.stride) {
      stride[0] = channels;
      stride[1] = 1;
    }
    layout.channel_dim = 1;
    const detail::ChannelRows plan(layout, kNormTask);
    fold = plan.fold;
    row_elements = plan.row_elements;
    folded_rows = plan.folded_rows;
    chunk = plan.chunk;
    chunks = plan.chunks;
    tasks = plan.tasks();
    width = channels < kGridBlock ? channels : kGridBlock;
  }

  QK_HD int64_t first_column(int64_t task) const { return task / chunks * kGridBlock; }
  QK_HD int64_t columns(int64_t task) const {
    const int64_t left = row_elements - first_column(task);
    return left < kGridBlock ? left : kGridBlock;
  }
  QK_HD int64_t first_row(int64_t task) const { return task % chunks * chunk; }
  QK_HD int64_t last_row(int64_t task) const {
    const int64_t last = first_row(task) + chunk;
    return last < folded_rows ? last : folded_rows;
  }
  // Column j of the task is of channel first_channel(task) + j % distinct_channels(task).
  QK_HD int64_t first_channel(int64_t task) const { return fold > 1 ? 0 : first_column(task); }
  QK_HD int64_t distinct_channels(int64_t task) const {
    return fold > 1 ? channels : columns(task);
  }
  // Task t of channel c is first_task(c) + t; the channel is number c % kGridBlock of it.
  QK_HD int64_t first_task(int64_t c) const { return c / kGridBlock * chunks; }

  // f(first element, NormRows), at most twice: the last folded row may be short.
  template <typename F>
  void for_each_part(int64_t task, const F& f) const {
    const int64_t begin = first_row(task), last = last_row(task), n = columns(task);
    const int64_t complete = elements / row_elements;  // folded rows
    const int64_t end = last < complete ? last : complete;
    if (end > begin) {
      f(begin * row_elements + first_column(task), NormRows{row_elements, end - begin, n});
    }
    if (last > complete) {
      f(complete * row_elements, NormRows{row_elements, 1, elements % row_elements});
    }
  }
};

}  // namespace qk
