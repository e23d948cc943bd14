#include "csrc/plan/layouts.h"

#include <algorithm>

namespace qk::plan {
namespace {

// Whether dimension `a` of a tensor lies outside (1) or inside (-1) of dimension `b`, as torch sees
// it; 0: either may.
int side_of(const View& view, int a, int b) {
  const int64_t sa = view.stride[a], sb = view.stride[b];
  if (sa == 0 || sb == 0) return 0;
  if (sa != sb) return sa < sb ? -1 : 1;
  return view.size[a] > view.size[b] ? 1 : 0;
}

// torch's Tensor::suggest_memory_format: whether strides look like channels last.
bool suggests_channels_last(const View& view) {
  if (view.rank() < 4 || view.rank() > 5 || view.stride[1] == 0) return false;
  int64_t least = 0;
  for (int i = view.rank(); i >= 1; --i) {
    const int d = i == view.rank() ? 1 : i == 1 ? 0 : i;  // C, the last spatial dimension, ..., N
    if (view.size[d] == 0 || view.stride[d] < least) return false;
    if (d == 0 && least == view.stride[1]) return false;
    least = view.stride[d] * std::max<int64_t>(view.size[d], 1);
  }
  return true;
}

void set_suggested(View* view, const View& like) {
  suggests_channels_last(like) ? set_channels_last(view) : set_contiguous(view);
}

class Layouts {
 public:
  Layouts(const Model& model, const Shapes& shapes) : model_(model), shapes_(shapes) {}

  std::vector<View> run(const std::vector<InputLayout>& inputs) {
    views_.resize(model_.values.size());
    for (size_t v = 0; v < views_.size(); ++v) {
      views_[v].dtype = model_.values[v].dtype;
      views_[v].size = shapes_.values[v];
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      View& view = views_[model_.inputs[i].value];
      std::copy(inputs[i].stride, inputs[i].stride + kMaxRank, view.stride);
    }
    for (const Step& step : model_.steps) lay(step, &views_[step.output]);
    return std::move(views_);
  }

 private:
  const View& input(const Step& step, int i) const { return views_[step.inputs[i]]; }

  void lay(const Step& step, View* out) const {
    switch (step.kind) {
      case StepKind::kConstant:
      case StepKind::kLinear:
        return set_contiguous(out);
      case StepKind::kQuantize:
      case StepKind::kDequantize:
      case StepKind::kLookup:
        return set_like(out, input(step, 0));
      case StepKind::kConv:
      case StepKind::kMaxPool:
      case StepKind::kAvgPool:
      case StepKind::kAdaptiveAvgPool:
        return set_channels_last(out);
      case StepKind::kAdd:
      case StepKind::kMul:
        for (const int k : {0, 1}) {
          if (input(step, k).size == out->size) return set_like(out, input(step, k));
        }
        return set_contiguous(out);
      case StepKind::kCat: {
        const bool pixels = std::all_of(step.inputs.begin(), step.inputs.end(), [this](int v) {
          return views_[v].size.elements() == 0 || is_channels_last(views_[v]);
        });
        return pixels ? set_channels_last(out) : set_contiguous(out);
      }
      case StepKind::kInterpolate:
        return set_suggested(out, input(step, 0));
      case StepKind::kPad:
        return pad(step.as<PadStep>(), input(step, 0), out);
      case StepKind::kReshape: {
        const Sizes size = out->size;
        if (!reshape_view(input(step, 0), size, out)) set_contiguous(out);
        return;
      }
      case StepKind::kPermute:
        for (int d = 0; d < out->rank(); ++d) {
          out->stride[d] = input(step, 0).stride[step.as<ShapeStep>().items[d]];
        }
        return;
      case StepKind::kSlice: {
        const auto& s = step.as<SliceStep>();
        std::copy(input(step, 0).stride, input(step, 0).stride + kMaxRank, out->stride);
        out->stride[s.dim] *= s.step;
        return;
      }
      case StepKind::kExpand:
        *out = broadcast(input(step, 0), out->size);
        return;
    }
  }

  // What only crops is a copy of the part.
  void pad(const PadStep& s, const View& in, View* out) const {
    const bool grows = std::any_of(s.amounts, s.amounts + 2 * s.pairs,
                                   [this](int at) { return shapes_.scalars[at] > 0; });
    if (grows) return set_suggested(out, in);
    View part = in;
    part.size = out->size;
    set_like(out, part);
  }

  const Model& model_;
  const Shapes& shapes_;
  std::vector<View> views_;
};

}  // namespace

void set_like(View* view, const View& like) {
  if (is_dense(like)) {
    std::copy(like.stride, like.stride + kMaxRank, view->stride);
    return;
  }
  const int rank = like.rank();
  int order[kMaxRank] = {};  // torch sorts from the innermost dimension outwards
  for (int i = 0; i < rank; ++i) order[i] = rank - 1 - i;
  for (int i = 1; i < rank; ++i) {
    int at = i;
    for (int before = i - 1; before >= 0; --before) {
      const int side = side_of(like, order[before], order[at]);
      if (side < 0) break;
      if (side == 0) continue;
      std::swap(order[before], order[at]);
      at = before;
    }
  }
  std::reverse(order, order + rank);
  set_dense_strides(view, order);
}

std::vector<View> module_layouts(const Model& model, const Shapes& shapes,
                                 const std::vector<InputLayout>& inputs) {
  return Layouts(model, shapes).run(inputs);
}

}  // namespace qk::plan
