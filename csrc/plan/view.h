// Where a value lies: a strided view of a buffer; and how kernels walk several of them at once.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/base/strided.h"
#include "csrc/plan/model.h"

namespace qk::plan {

struct Sizes {
  int rank = 0;
  int64_t dims[kMaxRank] = {};

  int64_t operator[](int d) const { return dims[d]; }
  int64_t& operator[](int d) { return dims[d]; }
  int64_t elements() const {
    int64_t n = 1;
    for (int d = 0; d < rank; ++d) n *= dims[d];
    return n;
  }
  bool operator==(const Sizes& other) const {
    if (rank != other.rank) return false;
    for (int d = 0; d < rank; ++d) {
      if (dims[d] != other.dims[d]) return false;
    }
    return true;
  }
};
std::string text(const Sizes& sizes);

// Element [i, j, ...] of the value is at byte offset + (i * stride[0] + j * stride[1] + ...) *
// dtype_bytes of the buffer.
struct View {
  int buffer = -1;
  int64_t offset = 0;
  DType dtype = DType::kU8;
  Sizes size;
  int64_t stride[kMaxRank] = {};

  int rank() const { return size.rank; }
};

inline int64_t bytes_of(const View& view) { return view.size.elements() * dtype_bytes(view.dtype); }

// Strides of a dense tensor whose dimensions lie in memory in `order`, outermost first.
void set_dense_strides(View* view, const int* order);
void set_contiguous(View* view);
void set_channels_last(View* view);  // N, *spatial, C; contiguous below rank 3
// Dense, in the memory order of `like` (of equal rank).
void set_order_of(View* view, const View& like);

// Dimensions of size 1 have no say in these.
bool is_contiguous(const View& view);
bool is_channels_last(const View& view);
bool is_dense(const View& view);  // in any order, no element twice
bool same_strides(const View& a, const View& b);
// Whether the pixels of an image are evenly spaced, each with its channels side by side: channels
// last, or a slice of the channels of something that is.
bool pixel_stride(const View& view, int64_t* stride);

// torch's rule: the strides of `view` seen with other sizes, if no copy is needed.
bool reshape_view(const View& view, Sizes size, View* reshaped);

// `view` broadcast to `size`.
View broadcast(const View& view, const Sizes& size);
// The part of `view` that starts at `first` in dimension `dim` and has `count` elements there.
View narrow(View view, int dim, int64_t first, int64_t count, int64_t step = 1);

// The dimensions of K operands of one shape, in the memory order of operand 0, neighbours merged.
// Dimension `keep` stays alone; *kept is where it went.
template <int K>
StridedLayout<K> walk(const View* const (&views)[K], int keep = -1, int* kept = nullptr) {
  struct Dim {
    int64_t size, stride[K];
    bool is_kept;
  };
  const Sizes& size = views[0]->size;
  Dim dims[kMaxRank];
  int count = 0;
  for (int d = 0; d < size.rank; ++d) {
    if (size[d] == 1 && d != keep) continue;
    Dim dim{size[d], {}, d == keep};
    for (int k = 0; k < K; ++k) dim.stride[k] = views[k]->stride[d];
    // Insertion sort, outermost first; a kept dimension of one element goes outermost.
    int at = count++;
    const auto before = [](const Dim& a, const Dim& b) {
      if ((a.size == 1) != (b.size == 1)) return a.size == 1;
      return a.stride[0] > b.stride[0];
    };
    for (; at > 0 && before(dim, dims[at - 1]); --at) dims[at] = dims[at - 1];
    dims[at] = dim;
  }
  int merged = 0;
  for (int i = 0; i < count; ++i) {
    bool joins = merged > 0 && !dims[i].is_kept && !dims[merged - 1].is_kept;
    for (int k = 0; joins && k < K; ++k) {
      joins = dims[merged - 1].stride[k] == dims[i].stride[k] * dims[i].size;
    }
    if (joins) {
      dims[merged - 1].size *= dims[i].size;
      for (int k = 0; k < K; ++k) dims[merged - 1].stride[k] = dims[i].stride[k];
    } else {
      dims[merged++] = dims[i];
    }
  }
  StridedLayout<K> layout;
  layout.dims = merged > 0 ? merged : 1;
  if (merged == 0) {
    layout.size[0] = 1;
    for (int k = 0; k < K; ++k) layout.stride[k][0] = 1;
  }
  for (int d = 0; d < merged; ++d) {
    layout.size[d] = dims[d].size;
    for (int k = 0; k < K; ++k) layout.stride[k][d] = dims[d].stride[k];
    if (dims[d].is_kept && kept != nullptr) *kept = d;
  }
  return layout;
}

}  // namespace qk::plan
