#include "python/quantize.h"

namespace qk::seam {

GridCall<QuantizeArgs> check_quantize(const Tensor& x, const Tensor& scale,
                                      const Tensor& zero_point, std::optional<int64_t> axis,
                                      int64_t qmin, int64_t qmax, Tensor out) {
  const FloatType type = check_float_type("quantize", "x", x);
  const bool q_signed = check_code_type("quantize", "the output dtype", out.scalar_type());
  check_code_range("quantize", out.scalar_type(), qmin, qmax);
  axis = check_axis("quantize", x, axis);
  GridCall<QuantizeArgs> call{
      x, axis, check_grid("quantize", x, scale, zero_point, axis, qmin, qmax), {}};
  check_out("quantize", x, out, out.scalar_type(),
            {{"x", x}, {"scale", scale}, {"zero_point", zero_point}});
  const GridLayout layout = plan_grid(out, &call.x, axis, call.grid);
  call.args = {.x = call.x.const_data_ptr(),
               .x_type = type,
               .q = out.mutable_data_ptr(),
               .q_signed = q_signed,
               .qmin = static_cast<int32_t>(qmin),
               .qmax = static_cast<int32_t>(qmax),
               .grid = layout};
  return call;
}

GridCall<DequantizeArgs> check_dequantize(const Tensor& q, const Tensor& scale,
                                          const Tensor& zero_point, std::optional<int64_t> axis,
                                          Tensor out) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Byte || dtype == ScalarType::Char || dtype == ScalarType::Int,
      "dequantize: q must be uint8, int8 or int32, got ", dtype_text(dtype));
  const FloatType type = check_float_type("dequantize", "the output dtype", out);
  axis = check_axis("dequantize", q, axis);
  const int64_t lowest = dtype == ScalarType::Char ? -128 : 0;
  GridCall<DequantizeArgs> call{
      q, axis, check_grid("dequantize", q, scale, zero_point, axis, lowest, lowest + 255), {}};
  const bool values_known = dtype == ScalarType::Int && q.is_cpu();
  for (int64_t c = 0; values_known && c < call.grid.channels; ++c) {
    STD_TORCH_CHECK(call.grid.zero_point[c] == 0,
                    "dequantize: zero_point must be 0 for int32, got ", call.grid.zero_point[c],
                    " at channel ", c);
  }
  check_out("dequantize", q, out, out.scalar_type(),
            {{"q", q, true}, {"scale", scale}, {"zero_point", zero_point}});
  const GridLayout layout = plan_grid(out, &call.x, axis, call.grid);
  call.args = {.q = call.x.const_data_ptr(),
               .q_type = dtype == ScalarType::Int    ? CodeType::kInt32
                         : dtype == ScalarType::Char ? CodeType::kInt8
                                                     : CodeType::kUInt8,
               .x = out.mutable_data_ptr(),
               .x_type = type,
               .grid = layout};
  return call;
}

namespace {

void quantize_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                  std::optional<int64_t> axis, int64_t qmin, int64_t qmax, Tensor out) {
  qk::quantize(check_quantize(x, scale, zero_point, axis, qmin, qmax, out).args, torch_threads());
}

Tensor quantize(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                std::optional<int64_t> axis, int64_t qmin, int64_t qmax, ScalarType dtype) {
  check_code_type("quantize", "dtype", dtype);
  Tensor out = empty_like(x, dtype);
  quantize_out(x, scale, zero_point, axis, qmin, qmax, out);
  return out;
}

void dequantize_out(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                    std::optional<int64_t> axis, Tensor out) {
  qk::dequantize(check_dequantize(q, scale, zero_point, axis, out).args, torch_threads());
}

Tensor dequantize(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                  std::optional<int64_t> axis, ScalarType dtype) {
  Tensor out = empty_like(q, dtype);
  dequantize_out(q, scale, zero_point, axis, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("quantize_out", TORCH_BOX(&quantize_out));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("dequantize_out", TORCH_BOX(&dequantize_out));
}

}  // namespace qk::seam
