// From torch tensors to csrc's pointers, and from csrc's statuses to Python errors. The only helper
// of the seam.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "csrc/base/parallel.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has no macro that keeps the message
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace qk::seam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether this process was forked from one with several threads: the threads of torch's pool stayed
// behind in that one, and the first call that waited for them would wait for ever.
bool pool_is_lost();

// torch's own pool, handed to csrc as a value.
inline Parallel torch_threads() {
  Parallel parallel;
  parallel.threads = pool_is_lost() ? 1 : static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](const Parallel&, int64_t tasks, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, tasks, 1,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return parallel;
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline const char* dtype_text(ScalarType type) { return torch::headeronly::toString(type); }

// "the CPU", "cuda:0".
std::string device_text(const Tensor& t);
// t must be where `like` is.
void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like);

// A per-channel grid as csrc wants it: float32 scales and int32 zero points, checked.
struct GridView {
  Tensor scale_owner;
  Tensor zero_point_owner;
  const float* scale;
  const int32_t* zero_point;
  int64_t channels;
};

GridView check_grid(const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                    std::optional<int64_t> axis, int64_t qmin, int64_t qmax);

// x seen as [outer, channels, inner] around `axis` (per tensor: [1, 1, numel]).
struct ChannelSplit {
  int64_t outer, channels, inner;
};
ChannelSplit split_channels(const Tensor& x, std::optional<int64_t> axis);

// A non-negative axis; an error names `op` if it is out of range.
std::optional<int64_t> check_axis(const char* op, const Tensor& x, std::optional<int64_t> axis);

}  // namespace qk::seam
