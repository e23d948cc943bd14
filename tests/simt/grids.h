// Float grids for tests of kernels: one over [outer, channels, inner], as the CPU and as CUDA want
// it.
#pragma once

#include <ostream>

#include "csrc/base/dtype.h"
#include "csrc/quantize/grid.h"
#include "tests/csrc/check.h"

namespace qk::test {

struct Shape {
  int64_t outer, channels, inner;
  int64_t size() const { return outer * channels * inner; }
};
inline std::ostream& operator<<(std::ostream& to, const Shape& s) {
  return to << s.outer << "x" << s.channels << "x" << s.inner;
}

class Grids {
 public:
  // Zero points in [low, high].
  Grids(const Shape& shape, Rng& rng, int64_t low = 0, int64_t high = 255)
      : shape_(shape), scale_(shape.channels), zero_point_(shape.channels) {
    for (float& v : scale_) v = rng.real(0.01f, 0.1f);
    for (int32_t& v : zero_point_) v = static_cast<int32_t>(rng.integer(low, high));
  }

  DenseGrid dense() const {
    return {scale_.data(), zero_point_.data(), shape_.size(), shape_.channels, shape_.inner};
  }
  // As the seam plans it: a channel of one element is the innermost dimension.
  GridLayout strided() const {
    GridLayout layout;
    layout.scale = scale_.data();
    layout.zero_point = zero_point_.data();
    const auto set = [&](std::initializer_list<int64_t> sizes) {
      int64_t stride = shape_.size();
      layout.strided.dims = 0;
      for (const int64_t size : sizes) {
        stride = size > 0 ? stride / size : 0;
        layout.strided.size[layout.strided.dims] = size;
        for (auto& operand : layout.strided.stride) operand[layout.strided.dims] = stride;
        ++layout.strided.dims;
      }
    };
    if (shape_.channels == 1) {
      set({shape_.size()});
    } else if (shape_.inner == 1) {
      set({shape_.outer, shape_.channels});
      layout.channel_dim = 1;
    } else if (shape_.outer == 1) {
      set({shape_.channels, shape_.inner});
      layout.channel_dim = 0;
    } else {
      set({shape_.outer, shape_.channels, shape_.inner});
      layout.channel_dim = 1;
    }
    return layout;
  }

 private:
  Shape shape_;
  Guarded<float> scale_;
  Guarded<int32_t> zero_point_;
};

// Mostly in range, some far outside some infinite or NaN.
template <typename T>
void fill_floats(Guarded<T>& values, Rng& rng) {
  const float inf = std::numeric_limits<float>::infinity(), nan = inf - inf;
  for (T& v : values) {
    from_float(rng.chance(0.1) ? rng.pick({inf, -inf, nan, -0.0f, 1e30f}) : rng.real(-9, 9), &v);
  }
}

}  // namespace qk::test
