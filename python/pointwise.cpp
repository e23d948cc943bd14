#include "python/pointwise.h"

namespace qk::seam {
namespace {

const uint8_t* bytes_of(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }

void check_table(const char* op, const Tensor& table, const Tensor& like) {
  check_code_type(op, "table", table.scalar_type());
  check_device(op, "table", table, like);
}

}  // namespace

LookupCall check_lookup(const Tensor& q, const Tensor& table) {
  check_code_type("lookup", "q", q.scalar_type());
  check_table("lookup", table, q);
  STD_TORCH_CHECK(table.dim() == 1 && table.numel() == 256,
                  "lookup: table must have shape [256], got ", shape_text(table));
  LookupCall call{q, torch::stable::contiguous(table), empty_like(q, table.scalar_type()), {}};
  StridedLayout<2> layout;
  plan_walk<2>(call.out, {&call.q}, false, -1, &layout);
  call.args = {.q = bytes_of(call.q),
               .out = static_cast<uint8_t*>(call.out.mutable_data_ptr()),
               .table = bytes_of(call.table),
               .layout = layout};
  return call;
}

BinaryCall check_binary(const char* op, BinaryOp kind, const Tensor& a, const Tensor& b,
                        const BinaryNumbers& n) {
  const bool a_signed = check_code_type(op, "a", a.scalar_type());
  const bool b_signed = check_code_type(op, "b", b.scalar_type());
  const bool out_signed = check_code_type(op, "dtype", n.dtype);
  check_device(op, "b", b, a);
  check_zero_point(op, "a_zero_point", a.scalar_type(), n.a_zero_point);
  check_zero_point(op, "b_zero_point", b.scalar_type(), n.b_zero_point);
  check_clamped_grid(op, "zero_point", n.dtype, n.zero_point, n.qmin, n.qmax);
  const BinaryGrid grid{.a_signed = a_signed,
                        .b_signed = b_signed,
                        .out_signed = out_signed,
                        .a_scale = check_scale(op, "a_scale", n.a_scale),
                        .b_scale = check_scale(op, "b_scale", n.b_scale),
                        .out_scale = check_scale(op, "scale", n.scale),
                        .a_zero_point = static_cast<int32_t>(n.a_zero_point),
                        .b_zero_point = static_cast<int32_t>(n.b_zero_point),
                        .out_zero_point = static_cast<int32_t>(n.zero_point),
                        .qmin = static_cast<int32_t>(n.qmin),
                        .qmax = static_cast<int32_t>(n.qmax)};
  if (kind == BinaryOp::kAdd) {
    check_add_scale(op, "a_scale", grid.a_scale);
    check_add_scale(op, "b_scale", grid.b_scale);
  } else {
    STD_TORCH_CHECK(is_finite(mul_multiplier(grid.a_scale, grid.b_scale, grid.out_scale)), op,
                    ": a_scale * b_scale / scale must be finite in float32, got ", grid.a_scale,
                    " * ", grid.b_scale, " / ", grid.out_scale);
  }
  BinaryCall call{a, b, empty_broadcast(op, a, b, n.dtype), {}};
  StridedLayout<3> layout;
  plan_walk<3>(call.out, {&call.a, &call.b}, true, -1, &layout);
  call.args = {.op = kind,
               .a = bytes_of(call.a),
               .b = bytes_of(call.b),
               .out = static_cast<uint8_t*>(call.out.mutable_data_ptr()),
               .grid = grid,
               .layout = layout};
  return call;
}

// One input of `cat` may have any layout: it is walked in the output's order.
CatCall check_cat(const std::vector<Tensor>& tensors, const Tensor& tables, int64_t dim) {
  STD_TORCH_CHECK(!tensors.empty(), "cat: tensors must not be empty");
  const int64_t count = static_cast<int64_t>(tensors.size());
  STD_TORCH_CHECK(tables.dim() == 2 && tables.size(0) == count && tables.size(1) == 256,
                  "cat: tables must have shape [", count, ", 256] (one a tensor), got ",
                  shape_text(tables));
  const Tensor& first = tensors[0];
  check_table("cat", tables, first);
  const int64_t axis = *check_axis("cat", first, dim);
  bool channels_last = first.dim() >= 3;
  std::vector<int64_t> sizes = sizes_of(first);
  sizes[axis] = 0;
  for (const Tensor& t : tensors) {
    check_code_type("cat", "every tensor", t.scalar_type());
    check_device("cat", "every tensor", t, first);
    STD_TORCH_CHECK(t.dim() == first.dim(), "cat: every tensor must have ", first.dim(),
                    " dimensions, got shape ", shape_text(t));
    for (int64_t d = 0; d < t.dim(); ++d) {
      STD_TORCH_CHECK(d == axis || t.size(d) == first.size(d), "cat: every tensor must have shape ",
                      shape_text(first), " outside of dimension ", axis, ", got ", shape_text(t));
    }
    STD_TORCH_CHECK(t.size(axis) <= INT64_MAX - sizes[axis],
                    "cat: tensors must have together at most 2^63 - 1 elements in dimension ", axis,
                    ", got ", shape_text(t), " after ", sizes[axis]);
    sizes[axis] += t.size(axis);
    channels_last = channels_last && (t.numel() == 0 || is_channels_last(t));
  }
  Tensor out = channels_last ? empty_channels_last(first, sizes, tables.scalar_type())
                             : empty(first, sizes, tables.scalar_type());
  // Bytes that belong to one index of `axis`, and rows of all such bytes.
  int64_t inner = 1, rows = 1;
  for (int64_t d = 0; d < first.dim(); ++d) {
    const bool inside = channels_last ? axis != 1 && (d == 1 || d > axis) : d > axis;
    if (d != axis) (inside ? inner : rows) *= sizes[d];
  }
  CatCall call{torch::stable::contiguous(tables), out, {}, {}, rows};
  for (int64_t k = 0; k < count; ++k) {
    const Tensor& t = tensors[k];
    call.owners.push_back(channels_last ? t : torch::stable::contiguous(t));
    call.inputs.push_back(
        {bytes_of(call.owners.back()), t.size(axis) * inner, bytes_of(call.tables) + 256 * k});
  }
  return call;
}

namespace {

Tensor lookup(const Tensor& q, const Tensor& table) {
  const LookupCall call = check_lookup(q, table);
  qk::lookup(call.args, torch_threads());
  return call.out;
}

Tensor add(const Tensor& a, const Tensor& b, double a_scale, int64_t a_zero_point, double b_scale,
           int64_t b_zero_point, double scale, int64_t zero_point, int64_t qmin, int64_t qmax,
           ScalarType dtype) {
  const BinaryCall call = check_binary(
      "add", BinaryOp::kAdd, a, b,
      {a_scale, a_zero_point, b_scale, b_zero_point, scale, zero_point, qmin, qmax, dtype});
  qk::binary(call.args, torch_threads());
  return call.out;
}

Tensor mul(const Tensor& a, const Tensor& b, double a_scale, int64_t a_zero_point, double b_scale,
           int64_t b_zero_point, double scale, int64_t zero_point, int64_t qmin, int64_t qmax,
           ScalarType dtype) {
  const BinaryCall call = check_binary(
      "mul", BinaryOp::kMul, a, b,
      {a_scale, a_zero_point, b_scale, b_zero_point, scale, zero_point, qmin, qmax, dtype});
  qk::binary(call.args, torch_threads());
  return call.out;
}

Tensor cat(const std::vector<Tensor>& tensors, const Tensor& tables, int64_t dim) {
  CatCall call = check_cat(tensors, tables, dim);
  qk::cat(call.args(), torch_threads());
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("lookup", TORCH_BOX(&lookup));
  m.impl("add", TORCH_BOX(&add));
  m.impl("mul", TORCH_BOX(&mul));
  m.impl("cat", TORCH_BOX(&cat));
}

}  // namespace qk::seam
