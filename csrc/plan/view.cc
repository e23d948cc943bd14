#include "csrc/plan/view.h"

#include <initializer_list>

namespace qk::plan {
namespace {

// Dimensions by falling stride; those of size 1 keep their place among equals.
void memory_order(const View& view, int* order) {
  for (int d = 0; d < view.rank(); ++d) {
    int at = d;
    for (; at > 0 && view.stride[order[at - 1]] < view.stride[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
}

bool strides_agree(const View& view, const View& wanted) {
  for (int d = 0; d < view.rank(); ++d) {
    if (view.size[d] != 1 && view.stride[d] != wanted.stride[d]) return false;
  }
  return true;
}

}  // namespace

std::string text(const Sizes& sizes) {
  std::string list = "[";
  for (int d = 0; d < sizes.rank; ++d) list += (d ? ", " : "") + std::to_string(sizes[d]);
  return list + "]";
}

void set_dense_strides(View* view, const int* order) {
  int64_t stride = 1;
  for (int i = view->rank() - 1; i >= 0; --i) {
    view->stride[order[i]] = stride;
    stride *= view->size[order[i]] > 0 ? view->size[order[i]] : 1;
  }
}

void set_contiguous(View* view) {
  int order[kMaxRank];
  for (int d = 0; d < view->rank(); ++d) order[d] = d;
  set_dense_strides(view, order);
}

void set_channels_last(View* view) {
  if (view->rank() < 3) return set_contiguous(view);
  int order[kMaxRank] = {0};
  for (int d = 2; d < view->rank(); ++d) order[d - 1] = d;
  order[view->rank() - 1] = 1;
  set_dense_strides(view, order);
}

void set_order_of(View* view, const View& like) {
  for (int d = 0; d < like.rank(); ++d) {
    if (like.stride[d] == 0 && like.size[d] > 1) return set_contiguous(view);
  }
  if (is_channels_last(like)) return set_channels_last(view);
  if (is_contiguous(like)) return set_contiguous(view);
  int order[kMaxRank];
  memory_order(like, order);
  set_dense_strides(view, order);
}

bool is_contiguous(const View& view) {
  View wanted = view;
  set_contiguous(&wanted);
  return strides_agree(view, wanted);
}

bool is_channels_last(const View& view) {
  if (view.rank() < 3) return false;
  View wanted = view;
  set_channels_last(&wanted);
  return strides_agree(view, wanted);
}

bool is_dense(const View& view) {
  View wanted = view;
  int order[kMaxRank];
  memory_order(view, order);
  // Dimensions of size 1 may stand anywhere: put them outermost.
  int moved[kMaxRank], count = 0;
  for (const bool ones : {true, false}) {
    for (int i = 0; i < view.rank(); ++i) {
      if ((view.size[order[i]] == 1) == ones) moved[count++] = order[i];
    }
  }
  set_dense_strides(&wanted, moved);
  return strides_agree(view, wanted);
}

bool pixel_stride(const View& view, int64_t* stride) {
  *stride = view.size[1];
  if (view.size[1] > 1 && view.stride[1] != 1) return false;
  int64_t expected = -1;
  for (int i = view.rank() - 1; i >= 1; --i) {
    const int d = i == 1 ? 0 : i;
    if (view.size[d] == 1) continue;
    if (expected < 0) {
      *stride = view.stride[d];
      if (*stride < view.size[1]) return false;  // an expanded dimension
    } else if (view.stride[d] != expected) {
      return false;
    }
    expected = view.stride[d] * view.size[d];
  }
  return true;
}

bool same_strides(const View& a, const View& b) { return a.size == b.size && strides_agree(a, b); }

bool reshape_view(const View& view, Sizes size, View* reshaped) {
  *reshaped = view;
  reshaped->size = size;
  if (size.elements() == 0) {
    set_contiguous(reshaped);
    return true;
  }
  // From the innermost dimension outwards: runs of old dimensions that lie behind one another are
  // one block; new dimensions must fill each block exactly.
  int next = size.rank - 1;
  int64_t block = 1, filled = 1;
  int64_t base = view.rank() > 0 ? view.stride[view.rank() - 1] : 1;
  for (int d = view.rank() - 1; d >= 0; --d) {
    block *= view.size[d];
    const bool ends = d == 0 || (view.size[d - 1] != 1 && view.stride[d - 1] != block * base);
    if (!ends) continue;
    while (next >= 0 && (filled < block || size[next] == 1)) {
      reshaped->stride[next] = filled * base;
      filled *= size[next--];
    }
    if (filled != block) return false;
    if (d > 0) {
      base = view.stride[d - 1];
      block = filled = 1;
    }
  }
  for (; next >= 0; --next) reshaped->stride[next] = 1;  // leading ones of a tensor of rank 0
  return true;
}

View broadcast(const View& view, const Sizes& size) {
  View wide = view;
  wide.size = size;
  const int missing = size.rank - view.rank();
  for (int d = 0; d < size.rank; ++d) {
    const bool repeats = d < missing || (view.size[d - missing] == 1 && size[d] != 1);
    wide.stride[d] = repeats ? 0 : view.stride[d - missing];
  }
  return wide;
}

View narrow(View view, int dim, int64_t first, int64_t count, int64_t step) {
  view.offset += first * view.stride[dim] * dtype_bytes(view.dtype);
  view.size[dim] = count;
  view.stride[dim] *= step;
  return view;
}

}  // namespace qk::plan
