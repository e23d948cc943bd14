// Strided elementwise iteration: how a kernel that works on contiguous runs covers tensors of any
// dense layout, slices with a contiguous inner dimension, and broadcast operands.
//
// A layout lists dimensions outermost first, with one stride (in elements) per operand. The caller
// has sorted them by the output's strides and merged neighbours, so that the innermost run is long;
// its stride is 1 (or 0 for a broadcast operand, if the kernel takes one).
#pragma once

#include <cstdint>

#include "csrc/base/parallel.h"

namespace qk {

inline constexpr int kMaxStridedDims = 8;

template <int kOperands>
struct StridedLayout {
  int dims = 1;  // at least 1
  int64_t size[kMaxStridedDims] = {1};
  int64_t stride[kOperands][kMaxStridedDims] = {};

  int64_t inner() const { return size[dims - 1]; }
  int64_t rows() const {
    int64_t n = 1;
    for (int d = 0; d + 1 < dims; ++d) n *= size[d];
    return n;
  }
};

// Position in the dimensions outside the innermost one.
template <int kOperands>
struct StridedCursor {
  const StridedLayout<kOperands>& layout;
  int64_t row;
  int64_t index[kMaxStridedDims] = {};
  int64_t offset[kOperands] = {};

  StridedCursor(const StridedLayout<kOperands>& layout, int64_t row) : layout(layout), row(row) {
    for (int d = layout.dims - 2; d >= 0; --d) {
      index[d] = row % layout.size[d];
      row /= layout.size[d];
      for (int k = 0; k < kOperands; ++k) offset[k] += index[d] * layout.stride[k][d];
    }
  }

  void next_row() {
    ++row;
    for (int d = layout.dims - 2; d >= 0; --d) {
      for (int k = 0; k < kOperands; ++k) offset[k] += layout.stride[k][d];
      if (++index[d] < layout.size[d]) return;
      for (int k = 0; k < kOperands; ++k) offset[k] -= layout.stride[k][d] * layout.size[d];
      index[d] = 0;
    }
  }
};

// Makes stores past the caches visible to other threads; once at the end of a thread's work.
inline void stream_fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

struct NoFinish {
  void operator()() const {}
};

// Calls f(cursor, first, n) for runs of at most `max_run` elements of the innermost dimension,
// starting at element `first` of the cursor's row; `finish` at the end of each thread's share.
template <int kOperands, typename F, typename Finish = NoFinish>
void for_each_run(const StridedLayout<kOperands>& layout, const Parallel& parallel, int64_t max_run,
                  int64_t work_ns, const F& f, const Finish& finish = {}) {
  const int64_t inner = layout.inner(), pieces = (inner + max_run - 1) / max_run;
  parallel.for_each_range(layout.rows() * pieces, work_ns, [&](int64_t begin, int64_t end) {
    StridedCursor<kOperands> cursor(layout, begin / pieces);
    int64_t first = (begin % pieces) * max_run;
    for (int64_t task = begin; task < end; ++task) {
      f(cursor, first, inner - first < max_run ? inner - first : max_run);
      first += max_run;
      if (first >= inner) {
        first = 0;
        cursor.next_row();
      }
    }
    finish();
  });
}

}  // namespace qk
