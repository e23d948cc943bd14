// add, mul and tables.
#include "csrc/plan/builder.h"
#include "csrc/plan/kernel_names.h"

namespace qk::plan {
namespace {

// Whether the kernel can read operand k in the walk's order.
bool readable(const StridedLayout<3>& layout, int k) {
  const int64_t inner = layout.stride[k][layout.dims - 1];
  return inner == 1 || inner == 0;
}

}  // namespace

void Builder::lower_binary(const Step& step, View* out) {
  const auto& s = step.as<BinaryStep>();
  View a = broadcast(input(step, 0), out->size), b = broadcast(input(step, 1), out->size);
  const bool a_full = input(step, 0).size == out->size, b_full = input(step, 1).size == out->size;
  if (a_full) {
    set_order_of(out, a);
  } else if (b_full) {
    set_order_of(out, b);
  } else {
    set_contiguous(out);
  }
  allocate(out);
  if (out->size.elements() == 0) return;
  StridedLayout<3> layout = walk<3>({out, &a, &b});
  for (int k = 1; k <= 2; ++k) {
    if (readable(layout, k)) continue;
    View& operand = k == 1 ? a : b;
    operand = with_strides(operand, *out);
    layout = walk<3>({out, &a, &b});
  }
  PairOp op;
  op.args = {step.kind == StepKind::kAdd ? BinaryOp::kAdd : BinaryOp::kMul,
             nullptr,
             nullptr,
             nullptr,
             {.a_signed = is_signed(a),
              .b_signed = is_signed(b),
              .out_signed = is_signed(*out),
              .a_scale = s.a.scale,
              .b_scale = s.b.scale,
              .out_scale = s.output.scale,
              .a_zero_point = s.a.zero_point,
              .b_zero_point = s.b.zero_point,
              .out_zero_point = s.output.zero_point,
              .qmin = s.output.qmin,
              .qmax = s.output.qmax},
             layout};
  op.a = ref(a);
  op.b = ref(b);
  op.out = ref(*out);
  may_overwrite(a, *out, {&b});
  may_overwrite(b, *out, {&a});
  emit(op, step_kind_name(step.kind), binary_kernel_name(step.kind == StepKind::kMul), {&a, &b},
       *out);
}

void Builder::lower_lookup(const Step& step, View* out) {
  const View& x = input(step, 0);
  set_order_of(out, x);
  allocate(out);
  may_overwrite(x, *out, {});
  emit_move(x, *out, constants_[step.as<LookupStep>().table], "lookup");
}

}  // namespace qk::plan
