// What flows through a network: strided views of memory that they may share, as torch's tensors
// are; how kernels read them (python/layout.cpp); and the steps that only move elements, which
// torch does on either device and host code does here.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "csrc/plan/shapes.h"
#include "tests/csrc/check.h"

namespace qk::test {

using plan::DType;
using plan::Sizes;
using plan::Step;
using plan::StepKind;
using plan::View;

// Exactly so many bytes, so that AddressSanitizer notices one too far; aligned as torch aligns.
inline std::shared_ptr<uint8_t> allocate(int64_t bytes, int fill = 0xa5) {
  constexpr std::align_val_t kAlign{64};
  const auto size = static_cast<size_t>(bytes);
  auto* data = static_cast<uint8_t*>(::operator new(size, kAlign));
  std::memset(data, fill, size);
  return {data, [](uint8_t* p) { ::operator delete(p, kAlign); }};
}

// view.offset counts from the start of `memory`.
struct Activation {
  View view;
  std::shared_ptr<uint8_t> memory;

  uint8_t* data() const { return memory.get() + view.offset; }
  const Sizes& size() const { return view.size; }
  bool is_signed() const { return view.dtype == DType::kS8; }
};

// Dense memory of its own for a view of these sizes, strides and dtype.
inline Activation new_activation(View view, int fill = 0xa5) {
  view.offset = 0;
  return {view, allocate(plan::bytes_of(view), fill)};
}

// Calls f(index) for every element of a tensor, in torch's order.
template <typename F>
void for_each_index(const Sizes& size, const F& f) {
  int64_t index[plan::kMaxRank] = {};
  for (int64_t i = 0, n = size.elements(); i < n; ++i) {
    f(index);
    for (int d = size.rank - 1; d >= 0 && ++index[d] == size[d]; --d) index[d] = 0;
  }
}

inline uint8_t* element(const Activation& x, const int64_t* index) {
  int64_t at = 0;
  for (int d = 0; d < x.view.rank(); ++d) at += index[d] * x.view.stride[d];
  return x.data() + at * plan::dtype_bytes(x.view.dtype);
}

inline void copy_elements(const Activation& from, const Activation& to) {
  const auto bytes = static_cast<size_t>(plan::dtype_bytes(from.view.dtype));
  for_each_index(from.size(), [&](const int64_t* index) {
    std::memcpy(element(to, index), element(from, index), bytes);
  });
}

// x itself, or a copy of it with the strides of `wanted`, whose dtype does not matter.
inline Activation with_strides(const Activation& x, View wanted) {
  if (plan::same_strides(x.view, wanted)) return x;
  wanted.dtype = x.view.dtype;
  const Activation copy = new_activation(wanted);
  copy_elements(x, copy);
  return copy;
}

inline Activation as_contiguous(const Activation& x) {
  View wanted = x.view;
  plan::set_contiguous(&wanted);
  return with_strides(x, wanted);
}

inline Activation as_channels_last(const Activation& x) {
  View wanted = x.view;
  plan::set_channels_last(&wanted);
  return with_strides(x, wanted);
}

// A view of x, or of a copy where there is none.
inline Activation reshaped(const Activation& x, const Sizes& size) {
  Activation result = x;
  if (plan::reshape_view(x.view, size, &result.view)) return result;
  result = as_contiguous(x);
  CHECK(plan::reshape_view(View(result.view), size, &result.view));
  return result;
}

// The walk over `out` and operands that are broadcast to it. One that kernels cannot read in its
// order is replaced by a copy; `repeats`: they can where the innermost stride is 0.
template <size_t kCount>
StridedLayout<1 + kCount> walk_over(const View& out,
                                    const std::array<Activation*, kCount>& operands, bool repeats,
                                    int axis = -1, int* axis_dim = nullptr) {
  for (Activation* x : operands) x->view = plan::broadcast(x->view, out.size);
  const auto plan_walk = [&] {
    const View* views[1 + kCount] = {&out};
    for (size_t k = 0; k < kCount; ++k) views[1 + k] = &operands[k]->view;
    return plan::walk<1 + kCount>(views, axis, axis_dim);
  };
  const StridedLayout<1 + kCount> layout = plan_walk();
  for (size_t k = 0; k < kCount; ++k) {
    const int64_t inner = layout.stride[1 + k][layout.dims - 1];
    const bool readable = inner == 1 || layout.inner() <= 1 || (inner == 0 && repeats);
    if (!readable) *operands[k] = with_strides(*operands[k], out);
  }
  return plan_walk();
}

// The rows of [..., K] at one stride, or a dense copy of them.
struct Rows {
  Activation owner;
  int64_t count, stride;

  explicit Rows(const Activation& x) {
    const int64_t k = x.size()[x.view.rank() - 1];
    count = x.size().elements() / k;
    owner = reshaped(x, {2, {count, k}});
    if (k > 1 && owner.view.stride[1] != 1) owner = as_contiguous(owner);
    stride = count == 1 ? 0 : owner.view.stride[0];
  }
};

// The size of D, H or W (d: 0 to 2) of [N, C, *spatial]; 1 where it is missing.
inline int64_t spatial_size(const Sizes& size, int d) {
  const int at = size.rank - 3 + d;
  return at < 2 ? 1 : size[at];
}

// The index of the input that torch's interpolate reads for index i of the output, float32
// arithmetic included.
inline int64_t nearest_index(const plan::InterpolateStep& s, int d, int64_t i, int64_t in,
                             int64_t out) {
  const bool shortcuts = !s.exact && s.dims > 1;
  if (shortcuts && (out == in || out == 2 * in)) return i / (out / in);
  const float scale = s.sized ? static_cast<float>(in) / static_cast<float>(out)
                              : static_cast<float>(1.0 / s.factor[d]);
  const float at = s.exact ? static_cast<float>((static_cast<double>(i) + 0.5) * scale)
                           : static_cast<float>(i) * scale;
  return std::min(static_cast<int64_t>(std::floor(at)), in - 1);
}

class DataMovement {
 public:
  DataMovement(const plan::Model& model, const plan::Shapes& shapes)
      : model_(model), shapes_(shapes) {}

  static bool does(StepKind kind) {
    switch (kind) {
      case StepKind::kConstant:
      case StepKind::kInterpolate:
      case StepKind::kPad:
      case StepKind::kReshape:
      case StepKind::kPermute:
      case StepKind::kSlice:
      case StepKind::kExpand:
        return true;
      default:
        return false;
    }
  }

  // `out`: the result's sizes and dtype, and its strides where it is no view of x.
  Activation run(const Step& step, const Activation& x, const View& out) const {
    Activation result = x;
    switch (step.kind) {
      case StepKind::kReshape:
        return reshaped(x, out.size);
      case StepKind::kPermute:
        result.view.size = out.size;
        for (int d = 0; d < out.rank(); ++d) {
          result.view.stride[d] = x.view.stride[step.as<plan::ShapeStep>().items[d]];
        }
        return result;
      case StepKind::kSlice:
        return slice(step.as<plan::SliceStep>(), x);
      case StepKind::kExpand:
        result.view = plan::broadcast(x.view, out.size);
        return result;
      case StepKind::kPad:
        return pad(step.as<plan::PadStep>(), x, out);
      case StepKind::kInterpolate:
        return interpolate(step.as<plan::InterpolateStep>(), x, out);
      default:
        return constant(model_.tensors[step.as<plan::ConstantStep>().tensor], out);
    }
  }

 private:
  static Activation constant(const plan::Tensor& tensor, const View& out) {
    const Activation result = new_activation(out);
    std::copy_n(tensor.data, tensor.bytes, result.data());
    return result;
  }

  Activation slice(const plan::SliceStep& s, Activation x) const {
    const plan::Slice part =
        plan::slice_of(shapes_.scalars[s.start], shapes_.scalars[s.stop], s.step, x.size()[s.dim]);
    x.view = plan::narrow(x.view, s.dim, part.count > 0 ? part.first : 0, part.count, s.step);
    return x;
  }

  Activation pad(const plan::PadStep& s, Activation x, const View& out) const {
    const Activation result = new_activation(out, static_cast<int>(s.value));
    Activation inside = result;
    for (int i = 0; i < s.pairs; ++i) {
      const int d = x.view.rank() - 1 - i;
      const int64_t before = shapes_.scalars[s.amounts[2 * i]];
      const int64_t after = shapes_.scalars[s.amounts[2 * i + 1]];
      const int64_t first = std::max<int64_t>(-before, 0);
      const int64_t count = x.size()[d] - first - std::max<int64_t>(-after, 0);
      x.view = plan::narrow(x.view, d, first, count);
      inside.view = plan::narrow(inside.view, d, std::max<int64_t>(before, 0), count);
    }
    copy_elements(x, inside);
    return result;
  }

  static Activation interpolate(const plan::InterpolateStep& s, const Activation& x,
                                const View& out) {
    const Activation result = new_activation(out);
    for_each_index(out.size, [&](const int64_t* index) {
      int64_t from[plan::kMaxRank] = {index[0], index[1]};
      for (int i = 0; i < s.dims; ++i) {
        from[2 + i] =
            nearest_index(s, 3 - s.dims + i, index[2 + i], x.size()[2 + i], out.size[2 + i]);
      }
      *element(result, index) = *element(x, from);
    });
    return result;
  }

  const plan::Model& model_;
  const plan::Shapes& shapes_;
};

}  // namespace qk::test
