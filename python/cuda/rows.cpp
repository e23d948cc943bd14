#include "python/rows.h"

#include "csrc/gemm/cuda.h"
#include "csrc/quantize_rows/cuda.h"
#include "python/cuda/adapt.h"

namespace qk::seam {
namespace {

using torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, int64_t qmin, int64_t qmax,
                                                 bool symmetric, ScalarType dtype) {
  const DeviceGuard guard(guarded_device("quantize_rows", x));
  const QuantizeRowsCall call = check_quantize_rows(x, qmin, qmax, symmetric, dtype);
  check_launch("quantize_rows", quantize_rows_cuda(call.args, current_stream(x)));
  return {call.q, call.scale, call.zero_point};
}

Tensor linear_rows(const Tensor& input, const Tensor& packed, const Tensor& row_scale,
                   const Tensor& row_zero_point, const Tensor& weight_scale,
                   const Tensor& weight_sum, const OptionalTensor& bias, int64_t out_features,
                   ScalarType output_dtype) {
  constexpr const char* op = "linear_rows";
  const DeviceGuard guard(guarded_device(op, input));
  check_device(op, "packed", packed, input);
  const LinearRowsCall call = check_linear_rows(input, row_scale, row_zero_point, weight_scale,
                                                weight_sum, bias, out_features, output_dtype);
  STD_TORCH_CHECK(call.depth <= kMaxKS8S8, op, ": in_features must be at most ", kMaxKS8S8,
                  ", got ", call.depth);
  const CudaPackedFacts facts =
      check_packed_cuda(op, "linear_pack", packed, out_features, 1, call.depth);
  STD_TORCH_CHECK(facts.output == OutputType::kS32, op,
                  ": packed must be made by linear_pack with an int32 output");
  STD_TORCH_CHECK(facts.input_signed == check_code_type(op, "input", input.scalar_type()), op,
                  ": input must be ", facts.input_signed ? "int8" : "uint8",
                  ", as it was when the weight was packed, got ", dtype_text(input.scalar_type()));
  check_row_sums(call.depth, facts.weight_zero_points);
  const CudaMachine machine = current_machine(op);
  Tensor out = empty(input, call.sizes, output_dtype);
  if (call.rows == 0 || out_features == 0) return out;
  check_launch_size(op, call.rows, out_features);
  LinearCudaArgs args{.packed = packed.const_data_ptr(),
                      .facts = facts,
                      .n = out_features,
                      .depth = call.depth,
                      .input = static_cast<const uint8_t*>(call.input.owner.const_data_ptr()),
                      .rows = call.rows,
                      .input_row_stride = call.input.stride,
                      .out = out.mutable_data_ptr(),
                      .residual = nullptr,
                      .residual_row_stride = 0,
                      .residual_signed = false,
                      .workspace = nullptr,
                      .scales = call.scales,
                      .scaled_output = call.output};
  const Tensor workspace = empty(input, {linear_cuda_workspace(args, machine)}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  check_launch(op, linear_cuda(args, plan_linear_cuda(args, machine), current_stream(input)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
}

}  // namespace qk::seam
