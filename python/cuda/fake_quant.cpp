#include "csrc/fake_quant/cuda.h"

#include "csrc/quantize/cuda.h"
#include "python/cuda/adapt.h"
#include "python/quantize.h"

namespace qk::seam {
namespace {

using torch::stable::accelerator::DeviceGuard;

void quantize_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                  std::optional<int64_t> axis, int64_t qmin, int64_t qmax, Tensor out) {
  const DeviceGuard guard(guarded_device("quantize", x));
  const auto call = check_quantize(x, scale, zero_point, axis, qmin, qmax, out);
  const Tensor dense = in_layout_of(out, call.x);
  check_launch("quantize", quantize_cuda({.x = dense.const_data_ptr(),
                                          .x_type = call.args.x_type,
                                          .q = static_cast<uint8_t*>(call.args.q),
                                          .qmin = call.args.qmin,
                                          .qmax = call.args.qmax,
                                          .grid = dense_grid(out, call.axis, call.grid)},
                                         current_stream(x)));
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
  const DeviceGuard guard(guarded_device("dequantize", q));
  const auto call = check_dequantize(q, scale, zero_point, axis, out);
  const Tensor dense = in_layout_of(out, call.x);
  check_launch("dequantize", dequantize_cuda({.q = dense.const_data_ptr(),
                                              .q_type = call.args.q_type,
                                              .x = call.args.x,
                                              .x_type = call.args.x_type,
                                              .grid = dense_grid(out, call.axis, call.grid)},
                                             current_stream(q)));
}

Tensor dequantize(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                  std::optional<int64_t> axis, ScalarType dtype) {
  Tensor out = empty_like(q, dtype);
  dequantize_out(q, scale, zero_point, axis, out);
  return out;
}

void fake_quant_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                    std::optional<int64_t> axis, int64_t qmin, int64_t qmax, Tensor out) {
  const DeviceGuard guard(guarded_device("fake_quant", x));
  const auto call = check_fake_quant(x, scale, zero_point, axis, qmin, qmax, out);
  const Tensor dense = in_layout_of(out, call.x);
  check_launch("fake_quant", fake_quant_cuda({.x = dense.const_data_ptr(),
                                              .y = call.args.y,
                                              .type = call.args.type,
                                              .qmin = call.args.qmin,
                                              .qmax = call.args.qmax,
                                              .grid = dense_grid(out, call.axis, call.grid)},
                                             current_stream(x)));
}

Tensor fake_quant(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                  std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  Tensor out = empty_like(x, x.scalar_type());
  fake_quant_out(x, scale, zero_point, axis, qmin, qmax, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("quantize_out", TORCH_BOX(&quantize_out));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("dequantize_out", TORCH_BOX(&dequantize_out));
  m.impl("fake_quant", TORCH_BOX(&fake_quant));
  m.impl("fake_quant_out", TORCH_BOX(&fake_quant_out));
}

}  // namespace qk::seam
