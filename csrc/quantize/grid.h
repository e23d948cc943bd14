// How a float grid lies over a tensor: one scale and zero point for all, or one a channel.
//
// A kernel sees one run of contiguous elements and a GridSpan: either one grid for the whole run,
// or (channel innermost, the channels-last activation) one a element.
#pragma once

#include <cstdint>

#include "csrc/base/strided.h"

namespace qk {

struct GridSpan {
  const float* scale;
  const float* inv_scale;  // 1.0f / scale
  const int32_t* zero_point;
  bool per_element;  // false: element 0 holds for the whole run
};

// Two operands: 0 the output, 1 the input.
struct GridLayout {
  StridedLayout<2> strided;
  int channel_dim = -1;  // a dimension of `strided`, or -1: per tensor
  const float* scale = nullptr;
  const int32_t* zero_point = nullptr;
};

// The same over tensors that are dense and in one memory layout: element i of memory has channel
// i / inner % channels.
struct DenseGrid {
  const float* scale = nullptr;         // [channels]
  const int32_t* zero_point = nullptr;  // [channels]
  int64_t size = 0;
  int64_t channels = 1;
  int64_t inner = 1;  // elements of a channel that follow one another

  bool channel_is_innermost() const { return channels > 1 && inner == 1; }
  // A tensor without channels as one row.
  DenseGrid in_rows() const {
    DenseGrid grid = *this;
    if (channels == 1) grid.inner = size;
    return grid;
  }
};

// Elements of one task: its input and output stay inside L1 and L2.
inline constexpr int64_t kGridRun = 8192;
// Channels whose reciprocal scales are prepared at a time when the channel is innermost.
inline constexpr int64_t kGridBlock = 512;

namespace detail {

struct GridBlock {
  alignas(64) float scale[kGridBlock];
  alignas(64) float inv_scale[kGridBlock];
  alignas(64) int32_t zero_point[kGridBlock];

  // Entry i is channel first + i % period.
  void fill(const GridLayout& grid, int64_t first, int64_t period, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = first + i % period;
      scale[i] = grid.scale[c];
      zero_point[i] = grid.zero_point[c];
    }
    for (int64_t i = 0; i < n; ++i) inv_scale[i] = 1.0f / scale[i];
  }
};

// Rows of one element a channel, cut into tasks of some rows of at most kGridBlock columns. Narrow
// dense rows are folded: k rows of C channels become one row of k * C.
struct ChannelRows {
  const GridLayout& grid;
  int64_t channels, rows;
  int64_t fold, row_elements, folded_rows;
  int64_t blocks, width;  // of columns
  int64_t chunk, chunks;  // of rows

  ChannelRows(const GridLayout& layout, int64_t task_elements)
      : grid(layout), channels(layout.strided.inner()), rows(layout.strided.rows()) {
    const StridedLayout<2>& in = layout.strided;
    const bool dense = in.dims == 1 ||
                       (in.dims == 2 && in.stride[0][0] == channels && in.stride[1][0] == channels);
    fold = dense && channels <= kGridBlock / 2 ? kGridBlock / channels : 1;
    row_elements = fold * channels;
    folded_rows = (rows + fold - 1) / fold;
    blocks = (row_elements + kGridBlock - 1) / kGridBlock;
    width = row_elements < kGridBlock ? row_elements : kGridBlock;
    chunk = task_elements / width;
    chunks = (folded_rows + chunk - 1) / chunk;
  }

  int64_t tasks() const { return blocks * chunks; }
  int64_t first_column(int64_t task) const { return task / chunks * kGridBlock; }
  int64_t columns(int64_t task) const {
    const int64_t left = row_elements - first_column(task);
    return left < kGridBlock ? left : kGridBlock;
  }

  // Calls f(output offset, input offset, n): the last folded row may be short.
  template <typename F>
  void for_each_row(int64_t task, const F& f) const {
    const int64_t first = first_column(task), n = columns(task), first_row = task % chunks * chunk;
    const int64_t last_row = first_row + chunk < folded_rows ? first_row + chunk : folded_rows;
    if (fold > 1) {
      for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t offset = row * row_elements, left = rows * channels - offset;
        f(offset, offset, left < n ? left : n);
      }
    } else {
      StridedCursor<2> cursor(grid.strided, first_row);
      for (int64_t row = first_row; row < last_row; ++row, cursor.next_row()) {
        f(cursor.offset[0] + first, cursor.offset[1] + first, n);
      }
    }
  }
};

// Calls f(task, span) for each task, on any thread; `finish` at the end of each thread's share.
template <typename F, typename Finish>
void for_each_channel_task(const ChannelRows& plan, const Parallel& parallel, int64_t work_ns,
                           const F& f, const Finish& finish) {
  parallel.for_each_range(plan.tasks(), work_ns, [&](int64_t begin, int64_t end) {
    GridBlock prepared;
    int64_t prepared_column = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = plan.first_column(task);
      if (first != prepared_column) {
        prepared.fill(plan.grid, first, plan.channels, plan.columns(task));
      }
      prepared_column = first;
      f(task, GridSpan{prepared.scale, prepared.inv_scale, prepared.zero_point, true});
    }
    finish();
  });
}

}  // namespace detail

// Calls f(output offset, input offset, n, span) on contiguous runs that cover the tensor; `finish`
// at the end of each thread's share.
template <typename F, typename Finish = NoFinish>
void for_each_grid_run(const GridLayout& grid, const Parallel& parallel, const F& f,
                       const Finish& finish = {}) {
  const StridedLayout<2>& in = grid.strided;
  const int64_t elements = in.rows() * in.inner(), work_ns = elements / 8;
  if (elements == 0) return;
  if (grid.channel_dim == in.dims - 1) {
    const detail::ChannelRows plan(grid, kGridRun);
    const auto task = [&](int64_t index, const GridSpan& span) {
      plan.for_each_row(index, [&](int64_t y, int64_t x, int64_t n) { f(y, x, n, span); });
    };
    detail::for_each_channel_task(plan, parallel, work_ns, task, finish);
    return;
  }
  const auto run = [&](const StridedCursor<2>& cursor, int64_t first, int64_t n) {
    const int64_t c = grid.channel_dim < 0 ? 0 : cursor.index[grid.channel_dim];
    const float inv_scale = 1.0f / grid.scale[c];
    const GridSpan span{grid.scale + c, &inv_scale, grid.zero_point + c, false};
    f(cursor.offset[0] + first, cursor.offset[1] + first, n, span);
  };
  for_each_run(in, parallel, kGridRun, work_ns, run, finish);
}

}  // namespace qk
