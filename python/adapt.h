// From torch tensors to csrc's pointers, and from csrc's statuses to Python errors. The only helper
// of the seam.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "csrc/base/parallel.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has no macro that keeps the message
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

// Torch's macro puts the C++ function, file and line before the message, which is for users of
// Python and names the op and the argument.
#undef STD_TORCH_CHECK
#define STD_TORCH_CHECK(condition, ...)                              \
  if (!(condition)) [[unlikely]] {                                   \
    throw std::runtime_error(::qk::seam::message_text(__VA_ARGS__)); \
  }

namespace qk::seam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string message_text(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The name of an op as a template argument, from what stands in TORCH_BOX.
template <size_t kSize>
struct OpName {
  consteval OpName(const char (&function)[kSize]) {
    std::copy(function + (function[0] == '&'), function + kSize, text);
  }
  char text[kSize] = {};
};

// The op that this thread runs, for errors of what ops share.
inline thread_local const char* running_op = "qkernels";

// None comes through a schema's `Tensor` as an undefined one, of which torch says nothing useful.
inline void check_defined(const char* op, int position, const Tensor& t) {
  STD_TORCH_CHECK(t.defined(), op, ": argument ", position, " must be a tensor, got None");
}
template <typename T>
void check_defined(const char*, int, const T&) {}

template <OpName op, auto function>
struct Boxed;

template <OpName op, typename Result, typename... Parameters, Result (*function)(Parameters...)>
struct Boxed<op, function> {
  static Result call(Parameters... arguments) {
    running_op = op.text;
    int position = 0;
    (check_defined(op.text, ++position, arguments), ...);
    return function(std::forward<Parameters>(arguments)...);
  }
  static constexpr auto kFunction = TORCH_BOX(&call);
};

// A function named as its op.
#undef TORCH_BOX
#define TORCH_BOX(function) (::qk::seam::Boxed<#function, function>::kFunction)

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

inline std::string sizes_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

inline std::string shape_text(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes_text(sizes);
}

// As Python shows it: "torch.uint8".
std::string dtype_text(ScalarType type);

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
