// Memory layouts of tensors: what a kernel walks, and what an op returns. An op keeps the layout of
// its input (as torch.empty_like does); a channels-last op returns channels_last.
#pragma once

#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include "csrc/base/dtype.h"
#include "csrc/base/strided.h"
#include "csrc/quantize/grid.h"
#include "python/adapt.h"

namespace qk::seam {

// Uninitialized, with the layout that torch.empty_like gives.
Tensor empty_like(const Tensor& like, ScalarType dtype);
// This and the following on the device of `like`.
Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                     const std::vector<int64_t>& strides, ScalarType dtype);
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);
Tensor empty_on_cpu(const std::vector<int64_t>& sizes, ScalarType dtype);

// [N, C, *spatial] stored as N, *spatial, C.
Tensor empty_channels_last(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);
std::vector<int64_t> channels_last_strides(const std::vector<int64_t>& sizes);
bool is_channels_last(const Tensor& t);
// t itself if it is channels_last, else a copy that is.
Tensor as_channels_last(const Tensor& t);

std::vector<int64_t> sizes_of(const Tensor& t);
std::vector<int64_t> strides_of(const Tensor& t);
// True if t's elements fill one block of memory, each once, in some order of the dimensions.
bool is_dense(const Tensor& t);
// Whether the elements of two tensors of one shape lie in the same order.
bool same_layout(const Tensor& a, const Tensor& b);
// A copy of t (broadcast if it must be) in the shape and layout of `like`.
Tensor copy_in_layout(const Tensor& t, const Tensor& like);

// The rows of [..., K] at one stride, or a dense copy of them.
struct Rows {
  Tensor owner;
  int64_t stride;
};
Rows as_rows(const Tensor& t);

std::vector<int64_t> broadcast_shape(const char* op, const Tensor& a, const Tensor& b);
// The result of an elementwise op on a and b: the layout of the first of them that has the full
// shape, else contiguous.
Tensor empty_broadcast(const char* op, const Tensor& a, const Tensor& b, ScalarType dtype);

FloatType check_float_type(const char* op, const char* name, const Tensor& t);
// uint8 or int8; true if signed.
bool check_code_type(const char* op, const char* name, ScalarType type);
// A scale given as a number: positive, finite and normal in float32.
float check_scale(const char* op, const char* name, double scale);
// A clamp, each end infinite for none.
struct Limits {
  float floor = -std::numeric_limits<float>::infinity();
  float ceiling = std::numeric_limits<float>::infinity();
};
Limits check_limits(const char* op, std::optional<double> floor, std::optional<double> ceiling);
// The scale of an operand of an addition.
void check_add_scale(const char* op, const char* name, float scale);
// A zero point inside the range of the dtype.
void check_zero_point(const char* op, const char* name, ScalarType dtype, int64_t zero_point);
// The codes of a grid: qmin < qmax, inside the dtype.
void check_code_range(const char* op, ScalarType dtype, int64_t qmin, int64_t qmax);
// The grid of an output whose codes a fused clamp limits to [qmin, qmax], perhaps to one of them or
// to a range without the zero point.
void check_clamped_grid(const char* op, const char* name, ScalarType dtype, int64_t zero_point,
                        int64_t qmin, int64_t qmax);
// A tensor that an op reads while it writes to `out`.
struct Read {
  const char* name;
  const Tensor& tensor;
  bool in_place = false;  // out may be this tensor, element for element
};
// out: the shape of x, `dtype`, on x's device, dense, and in x's layout if x is dense. It shares no
// memory with what is read, unless in place; the bytes between the elements of a tensor count as
// its own.
void check_out(const char* op, const Tensor& x, const Tensor& out, ScalarType dtype,
               std::initializer_list<Read> reads);

// The walk of an elementwise kernel over `out` and its operands (same shape or broadcast to it).
// An operand that the kernel cannot read in out's order is replaced by a copy, in place.
// `broadcast_inner`: the kernel takes a stride of 0 in the innermost dimension. `axis` (or -1) is
// kept apart from its neighbours; where it went is returned.
template <int kOperands>
int plan_walk(const Tensor& out, std::initializer_list<Tensor*> operands, bool broadcast_inner,
              int64_t axis, StridedLayout<kOperands>* layout);

// The walk of quantize, dequantize and fake_quant.
GridLayout plan_grid(const Tensor& out, Tensor* x, std::optional<int64_t> axis,
                     const GridView& grid);

}  // namespace qk::seam
