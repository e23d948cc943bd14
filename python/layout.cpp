#include "python/layout.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>

#include "csrc/plan/move.h"

namespace qk::seam {
namespace {

// The stride of the leading dimensions seen as one, if there is one and the last is dense.
std::optional<int64_t> row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t expected = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (!stride.has_value()) {
      stride = t.stride(d);
    } else if (t.stride(d) != expected) {
      return std::nullopt;
    }
    expected = t.stride(d) * t.size(d);
  }
  return stride.value_or(0);
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) {
    strides[d] = stride;
  }
  return strides;
}

// The bytes from the first element of a tensor that is not empty to its last.
struct ByteSpan {
  const char *begin, *end;

  explicit ByteSpan(const Tensor& t) : begin(static_cast<const char*>(t.const_data_ptr())) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    end = begin + (last + 1) * static_cast<int64_t>(t.element_size());
  }
  bool meets(const ByteSpan& other) const { return begin < other.end && other.begin < end; }
};

void check_memory(const char* op, const Tensor& out, const Read& read) {
  const auto& [name, t, in_place] = read;
  if (out.numel() == 0 || t.numel() == 0) return;
  const ByteSpan written(out), kept(t);
  if (!written.meets(kept)) return;
  const bool same = written.begin == kept.begin && written.end == kept.end &&
                    sizes_of(out) == sizes_of(t) && same_layout(out, t);
  STD_TORCH_CHECK(in_place && same, op, ": out must ",
                  in_place ? "be one with " : "share no memory with ", name,
                  in_place ? " or share no memory with it" : "", ", got ",
                  same ? "its memory" : "a part of its memory");
}

// Calls `call`; torch 2.11 and 2.12 do not tell an extension why it failed.
template <class Call>
void allocate(const std::vector<int64_t>& sizes, ScalarType dtype, const Call& call) {
  try {
    call();
  } catch (const std::exception& error) {
    throw std::runtime_error(message_text(running_op, ": out of memory for a ", dtype_text(dtype),
                                          " tensor of shape ", sizes_text(sizes), ": ",
                                          error.what()));
  }
}

// Past the dispatcher, which would cost more than a small operation.
Tensor empty_on(int32_t device_type, int32_t device_index, const std::vector<int64_t>& sizes,
                const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  allocate(sizes, dtype, [&] {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
        device_index, &handle));
  });
  return Tensor(handle);
}

template <int kOperands>
struct WalkDim {
  int64_t size, stride[kOperands];
  bool is_axis;
};

// The dimensions of `out` and what is read with it, outermost first by the strides of `out`,
// neighbours merged except `axis`.
template <int kOperands>
std::vector<WalkDim<kOperands>> walk_dims(const Tensor& out,
                                          std::initializer_list<Tensor*> operands, int64_t axis) {
  using Dim = WalkDim<kOperands>;
  const bool empty = out.numel() == 0;
  std::vector<Dim> dims;
  for (int64_t d = 0; d < out.dim(); ++d) {
    if ((out.size(d) == 1 || empty) && d != axis) continue;
    Dim dim{out.size(d), {out.stride(d)}, d == axis};
    int k = 1;
    for (const Tensor* t : operands) {
      const int64_t own = d - (out.dim() - t->dim());
      dim.stride[k++] = own < 0 || t->size(own) == 1 ? 0 : t->stride(own);
    }
    dims.push_back(dim);
  }
  // One dimension of size 0 stands for all that an empty tensor has beside the axis.
  if (empty && (axis < 0 || out.size(axis) != 0)) dims.push_back({0, {}, false});
  // A dimension of one element (the axis alone can be) goes outermost.
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
    if ((a.size == 1) != (b.size == 1)) return a.size == 1;
    return a.stride[0] > b.stride[0];
  });
  std::vector<Dim> merged;
  for (const Dim& dim : dims) {
    bool merges = !merged.empty() && !merged.back().is_axis && !dim.is_axis;
    for (int k = 0; merges && k < kOperands; ++k) {
      merges = merged.back().stride[k] == dim.stride[k] * dim.size;
    }
    if (merges) {
      const int64_t size = merged.back().size * dim.size;
      merged.back() = dim;
      merged.back().size = size;
    } else {
      merged.push_back(dim);
    }
  }
  if (merged.empty()) merged.push_back({1, {}, false});
  return merged;
}

template <int kOperands>
StridedLayout<kOperands> walk_layout(const std::vector<WalkDim<kOperands>>& dims) {
  StridedLayout<kOperands> layout;
  layout.dims = static_cast<int>(dims.size());
  for (int d = 0; d < layout.dims; ++d) {
    layout.size[d] = dims[d].size;
    for (int k = 0; k < kOperands; ++k) layout.stride[k][d] = dims[d].stride[k];
  }
  return layout;
}

// Copies t (broadcast if it must be) to `out`, which shares no memory with it. For codes on the CPU
// the copy of plans, which transposes bytes in blocks, takes a tenth of the time of torch's.
void copy_to(Tensor out, Tensor t) {
  if (t.is_cpu() && t.element_size() == 1 && out.numel() > 0) {
    const std::vector<WalkDim<2>> dims = walk_dims<2>(out, {&t}, -1);
    if (dims.size() <= kMaxStridedDims) {
      plan::move({.in = static_cast<const uint8_t*>(t.const_data_ptr()),
                  .out = static_cast<uint8_t*>(out.mutable_data_ptr()),
                  .layout = walk_layout(dims)},
                 torch_threads());
      return;
    }
  }
  torch::stable::copy_(out, t);
}

}  // namespace

Rows as_rows(const Tensor& t) {
  if (const auto stride = row_stride(t)) return {t, *stride};
  return {torch::stable::contiguous(t), t.size(t.dim() - 1)};
}

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
  return sizes;
}

std::vector<int64_t> strides_of(const Tensor& t) {
  std::vector<int64_t> strides(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) strides[d] = t.stride(d);
  return strides;
}

Tensor empty_like(const Tensor& like, ScalarType dtype) {
  if (is_dense(like)) return empty_strided(like, sizes_of(like), strides_of(like), dtype);
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(like),         from(std::optional<ScalarType>(dtype)),
                                    from(std::nullopt), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt)};
  allocate(sizes_of(like), dtype, [&] {
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  });
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                     const std::vector<int64_t>& strides, ScalarType dtype) {
  int32_t type = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  return empty_on(type, index, sizes, strides, dtype);
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return empty_strided(like, sizes, contiguous_strides(sizes), dtype);
}

Tensor empty_on_cpu(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, contiguous_strides(sizes), dtype);
}

std::vector<int64_t> channels_last_strides(const std::vector<int64_t>& sizes) {
  const auto at_least_one = [](int64_t n) { return std::max<int64_t>(n, 1); };
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t stride = at_least_one(sizes[1]);
  for (size_t d = sizes.size() - 1; d >= 2; --d) {
    strides[d] = stride;
    stride *= at_least_one(sizes[d]);
  }
  strides[0] = stride;
  return strides;
}

Tensor empty_channels_last(const Tensor& like, const std::vector<int64_t>& sizes,
                           ScalarType dtype) {
  return empty_strided(like, sizes, channels_last_strides(sizes), dtype);
}

bool is_channels_last(const Tensor& t) {
  if (t.dim() < 2) return false;
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    const int64_t size = t.size(d);
    const bool lies = size == 1 || t.stride(d) == expected;
    expected *= std::max<int64_t>(size, 1);
    return lies;
  };
  if (!fits(1)) return false;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (!fits(d)) return false;
  }
  return fits(0);
}

Tensor as_channels_last(const Tensor& t) {
  if (is_channels_last(t)) return t;
  const Tensor copy = empty_channels_last(t, sizes_of(t), t.scalar_type());
  copy_to(copy, t);
  return copy;
}

bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return true;
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

Tensor copy_in_layout(const Tensor& t, const Tensor& like) {
  const Tensor copy = empty_like(like, t.scalar_type());
  copy_to(copy, t);
  return copy;
}

std::vector<int64_t> broadcast_shape(const char* op, const Tensor& a, const Tensor& b) {
  const int64_t dims = std::max(a.dim(), b.dim());
  std::vector<int64_t> shape(dims);
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t da = d - (dims - a.dim()), db = d - (dims - b.dim());
    const int64_t na = da < 0 ? 1 : a.size(da), nb = db < 0 ? 1 : b.size(db);
    STD_TORCH_CHECK(na == nb || na == 1 || nb == 1, op,
                    ": b must have a shape that broadcasts with a, got a ", shape_text(a),
                    " and b ", shape_text(b));
    shape[d] = na == 1 ? nb : na;
  }
  return shape;
}

Tensor empty_broadcast(const char* op, const Tensor& a, const Tensor& b, ScalarType dtype) {
  const std::vector<int64_t> shape = broadcast_shape(op, a, b);
  if (sizes_of(a) == shape) return empty_like(a, dtype);
  if (sizes_of(b) == shape) return empty_like(b, dtype);
  return empty(a, shape, dtype);
}

FloatType check_float_type(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
      ": ", name, " must be torch.float32, torch.bfloat16 or torch.float16, got ",
      dtype_text(type));
  if (type == ScalarType::Float) return FloatType::kFloat32;
  return type == ScalarType::Half ? FloatType::kFloat16 : FloatType::kBFloat16;
}

bool check_code_type(const char* op, const char* name, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Byte || type == ScalarType::Char, op, ": ", name,
                  " must be torch.uint8 or torch.int8, got ", dtype_text(type));
  return type == ScalarType::Char;
}

float check_scale(const char* op, const char* name, double scale) {
  const float value = static_cast<float>(scale);
  STD_TORCH_CHECK(std::isnormal(value) && value > 0, op, ": ", name,
                  " must be positive, finite and normal in float32, got ", scale);
  return value;
}

Limits check_limits(const char* op, std::optional<double> floor, std::optional<double> ceiling) {
  Limits limits;
  if (floor.has_value()) limits.floor = static_cast<float>(*floor);
  if (ceiling.has_value()) limits.ceiling = static_cast<float>(*ceiling);
  STD_TORCH_CHECK(limits.floor <= limits.ceiling, op, ": floor must not be above ceiling, got ",
                  limits.floor, " and ", limits.ceiling);
  return limits;
}

void check_add_scale(const char* op, const char* name, float scale) {
  STD_TORCH_CHECK(is_add_scale(scale), op, ": 255 * ", name, " must be finite in float32, got ",
                  name, " ", scale);
}

void check_zero_point(const char* op, const char* name, ScalarType dtype, int64_t zero_point) {
  const int64_t lowest = dtype == ScalarType::Char ? -128 : 0;
  STD_TORCH_CHECK(zero_point >= lowest && zero_point <= lowest + 255, op, ": ", name,
                  " must be in [", lowest, ", ", lowest + 255, "] for ", dtype_text(dtype),
                  ", got ", zero_point);
}

void check_code_range(const char* op, ScalarType dtype, int64_t qmin, int64_t qmax) {
  const int64_t lowest = dtype == ScalarType::Char ? -128 : 0;
  STD_TORCH_CHECK(qmin < qmax && qmin >= lowest && qmax <= lowest + 255, op,
                  ": qmin and qmax must satisfy ", lowest, " <= qmin < qmax <= ", lowest + 255,
                  " for ", dtype_text(dtype), ", got qmin ", qmin, " and qmax ", qmax);
}

void check_clamped_grid(const char* op, const char* name, ScalarType dtype, int64_t zero_point,
                        int64_t qmin, int64_t qmax) {
  const int64_t lowest = dtype == ScalarType::Char ? -128 : 0;
  STD_TORCH_CHECK(qmin <= qmax && qmin >= lowest && qmax <= lowest + 255, op,
                  ": qmin and qmax must satisfy ", lowest, " <= qmin <= qmax <= ", lowest + 255,
                  " for ", dtype_text(dtype), ", got qmin ", qmin, " and qmax ", qmax);
  check_zero_point(op, name, dtype, zero_point);
}

void check_out(const char* op, const Tensor& x, const Tensor& out, ScalarType dtype,
               std::initializer_list<Read> reads) {
  check_device(op, "out", out, x);
  STD_TORCH_CHECK(out.scalar_type() == dtype, op, ": out must be ", dtype_text(dtype), ", got ",
                  dtype_text(out.scalar_type()));
  STD_TORCH_CHECK(sizes_of(out) == sizes_of(x), op, ": out must have shape ", shape_text(x),
                  ", got ", shape_text(out));
  STD_TORCH_CHECK(is_dense(out), op,
                  ": out must be dense (no gaps, no repeated elements), got shape ",
                  shape_text(out), " with other strides");
  for (const Read& read : reads) check_memory(op, out, read);
  if (!is_dense(x)) return;
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.numel() == 0 || x.size(d) == 1 || x.stride(d) == out.stride(d), op,
                    ": out must have the layout of x (stride ", x.stride(d), " in dimension ", d,
                    "), got ", out.stride(d));
  }
}

template <int kOperands>
int plan_walk(const Tensor& out, std::initializer_list<Tensor*> operands, bool broadcast_inner,
              int64_t axis, StridedLayout<kOperands>* layout) {
  std::vector<WalkDim<kOperands>> dims = walk_dims<kOperands>(out, operands, axis);
  int k = 1;
  bool copied = false;
  for (Tensor* t : operands) {
    const int64_t inner = dims.back().stride[k++];
    const bool readable = inner == 1 || dims.back().size <= 1 || (inner == 0 && broadcast_inner);
    if (readable && dims.size() <= kMaxStridedDims) continue;
    *t = copy_in_layout(*t, out);
    copied = true;
  }
  if (copied) dims = walk_dims<kOperands>(out, operands, axis);
  STD_TORCH_CHECK(dims.size() <= kMaxStridedDims, "qkernels: a walk of more than ", kMaxStridedDims,
                  " dimensions over a tensor of shape ", shape_text(out));
  *layout = walk_layout(dims);
  for (int d = 0; d < layout->dims; ++d) {
    if (dims[d].is_axis) return d;
  }
  return -1;
}

template int plan_walk<2>(const Tensor&, std::initializer_list<Tensor*>, bool, int64_t,
                          StridedLayout<2>*);
template int plan_walk<3>(const Tensor&, std::initializer_list<Tensor*>, bool, int64_t,
                          StridedLayout<3>*);

GridLayout plan_grid(const Tensor& out, Tensor* x, std::optional<int64_t> axis,
                     const GridView& grid) {
  GridLayout layout;
  layout.scale = grid.scale;
  layout.zero_point = grid.zero_point;
  layout.channel_dim = plan_walk<2>(out, {x}, false, axis.value_or(-1), &layout.strided);
  return layout;
}

}  // namespace qk::seam
