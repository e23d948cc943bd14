// The grid of the element at hand, for a thread that goes through elements in the order of memory:
// it divides once to find its channel, then counts, and reloads only where a channel's run ends.
#pragma once

#include "csrc/base/cuda_elementwise.cuh"
#include "csrc/quantize/grid.h"

namespace qk::cuda {

template <typename Index>
class GridCursor {
 public:
  QK_DEVICE GridCursor(const DenseGrid& grid, Index element)
      : grid_(grid),
        channels_(static_cast<Index>(grid.channels)),
        inner_(static_cast<Index>(grid.inner)) {
    if (channels_ > 1) {
      channel_ = element / inner_ % channels_;
      within_ = element % inner_;
    }
    load();
  }

  QK_DEVICE void next() {
    if (channels_ == 1 || ++within_ != inner_) return;
    within_ = 0;
    if (++channel_ == channels_) channel_ = 0;
    load();
  }

  float scale, inv_scale;
  int32_t zero_point;

 private:
  QK_DEVICE void load() {
    scale = grid_.scale[channel_];
    inv_scale = 1.0f / scale;
    zero_point = grid_.zero_point[channel_];
  }

  const DenseGrid& grid_;
  const Index channels_, inner_;
  Index channel_ = 0, within_ = 0;
};

}  // namespace qk::cuda
