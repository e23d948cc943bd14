#include "python/pointwise.h"

#include "csrc/pointwise/cuda.h"
#include "csrc/pool/cuda.h"
#include "python/cuda/adapt.h"
#include "python/pool.h"

namespace qk::seam {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor lookup(const Tensor& q, const Tensor& table) {
  const DeviceGuard guard(guarded_device("lookup", q));
  const LookupCall call = check_lookup(q, table);
  check_launch("lookup", lookup_cuda(call.args, current_stream(q)));
  return call.out;
}

Tensor binary(const char* op, BinaryOp kind, const Tensor& a, const Tensor& b,
              const BinaryNumbers& numbers) {
  const DeviceGuard guard(guarded_device(op, a));
  const BinaryCall call = check_binary(op, kind, a, b, numbers);
  check_launch(op, binary_cuda(call.args, current_stream(a)));
  return call.out;
}

Tensor add(const Tensor& a, const Tensor& b, double a_scale, int64_t a_zero_point, double b_scale,
           int64_t b_zero_point, double scale, int64_t zero_point, int64_t qmin, int64_t qmax,
           ScalarType dtype) {
  return binary(
      "add", BinaryOp::kAdd, a, b,
      {a_scale, a_zero_point, b_scale, b_zero_point, scale, zero_point, qmin, qmax, dtype});
}

Tensor mul(const Tensor& a, const Tensor& b, double a_scale, int64_t a_zero_point, double b_scale,
           int64_t b_zero_point, double scale, int64_t zero_point, int64_t qmin, int64_t qmax,
           ScalarType dtype) {
  return binary(
      "mul", BinaryOp::kMul, a, b,
      {a_scale, a_zero_point, b_scale, b_zero_point, scale, zero_point, qmin, qmax, dtype});
}

Tensor cat(const std::vector<Tensor>& tensors, const Tensor& tables, int64_t dim) {
  const DeviceGuard guard(guarded_device("cat", tables));
  CatCall call = check_cat(tensors, tables, dim);
  check_launch("cat", cat_cuda(call.args(), current_stream(tables)));
  return call.out;
}

Tensor max_pool(const Tensor& q, const std::vector<int64_t>& kernel_size,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, bool ceil_mode) {
  const DeviceGuard guard(guarded_device("max_pool", q));
  const auto call = check_max_pool(q, {kernel_size, stride, padding, ceil_mode}, dilation);
  check_launch("max_pool", max_pool_cuda(call.args, current_stream(q)));
  return call.out;
}

Tensor avg_pool(const Tensor& q, const std::vector<int64_t>& kernel_size,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override,
                double q_scale, int64_t q_zero_point, double scale, int64_t zero_point,
                int64_t qmin, int64_t qmax, ScalarType dtype) {
  const DeviceGuard guard(guarded_device("avg_pool", q));
  const auto call = check_avg_pool(q, {kernel_size, stride, padding, ceil_mode}, count_include_pad,
                                   divisor_override,
                                   {q_scale, q_zero_point, scale, zero_point, qmin, qmax, dtype});
  check_launch("avg_pool", avg_pool_cuda(call.args, current_stream(q)));
  return call.out;
}

Tensor adaptive_avg_pool(const Tensor& q, const std::vector<int64_t>& output_size, double q_scale,
                         int64_t q_zero_point, double scale, int64_t zero_point, int64_t qmin,
                         int64_t qmax, ScalarType dtype) {
  const DeviceGuard guard(guarded_device("adaptive_avg_pool", q));
  const auto call = check_adaptive_avg_pool(
      q, output_size, {q_scale, q_zero_point, scale, zero_point, qmin, qmax, dtype});
  check_launch("adaptive_avg_pool", avg_pool_cuda(call.args, current_stream(q)));
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("lookup", TORCH_BOX(&lookup));
  m.impl("add", TORCH_BOX(&add));
  m.impl("mul", TORCH_BOX(&mul));
  m.impl("cat", TORCH_BOX(&cat));
  m.impl("max_pool", TORCH_BOX(&max_pool));
  m.impl("avg_pool", TORCH_BOX(&avg_pool));
  m.impl("adaptive_avg_pool", TORCH_BOX(&adaptive_avg_pool));
}

}  // namespace qk::seam
