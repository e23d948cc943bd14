#include "python/linear.h"

#include "csrc/gemm/cuda.h"
#include "python/cuda/adapt.h"

namespace qk::seam {
namespace {

// Packing reads values, so it waits for the device; it happens once, before any graph is captured.
Tensor linear_pack(const Tensor& weight, const Tensor& weight_scale,
                   const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                   double input_scale, int64_t input_zero_point, ScalarType input_dtype,
                   const std::vector<double>& epilogue, ScalarType output_dtype,
                   const OptionalTensor& table) {
  constexpr const char* op = "linear_pack";
  const LinearSource checked = check_linear_pack(
      to_cpu(weight), to_cpu(weight_scale), to_cpu(weight_zero_point), to_cpu(bias), input_scale,
      input_zero_point, input_dtype, epilogue, output_dtype, to_cpu(table));
  const PackSource& source = checked.source;
  STD_TORCH_CHECK(weight.is_cuda(), op, ": weight must be on the device of the other tensors");
  const int64_t bytes = packed_cuda_bytes(source.n, 1, source.depth, cuda_packed_facts(source));
  Tensor packed = empty_on_cpu({bytes}, ScalarType::Byte);
  check_packing(op, pack_igemm_cuda(source, packed.mutable_data_ptr()), source.depth, input_dtype);
  return to_device_of(weight, packed);
}

Tensor linear(const Tensor& input, const Tensor& packed, const OptionalTensor& residual,
              int64_t out_features, ScalarType output_dtype) {
  constexpr const char* op = "linear";
  check_device(op, "packed", packed, input);
  STD_TORCH_CHECK(input.is_cuda(), op, ": input must be on CUDA, as the other tensors are");
  const bool input_signed = check_code_type(op, "input", input.scalar_type());
  STD_TORCH_CHECK(out_features >= 0 && out_features < INT32_MAX, op,
                  ": out_features must be in [0, 2^31), got ", out_features);
  STD_TORCH_CHECK(input.dim() >= 1, op, ": input must have shape [..., in_features], got ",
                  shape_text(input));
  const int64_t depth = input.size(input.dim() - 1);
  STD_TORCH_CHECK(depth <= kMaxKS8S8, op, ": in_features must be at most ", kMaxKS8S8, ", got ",
                  depth);
  const CudaPackedFacts facts =
      check_packed_cuda(op, "linear_pack", packed, out_features, 1, depth);
  STD_TORCH_CHECK(facts.input_signed == input_signed, op, ": input must be ",
                  facts.input_signed ? "int8" : "uint8",
                  ", as it was when the weight was packed, got ", dtype_text(input.scalar_type()));
  STD_TORCH_CHECK(facts.output == check_output_type(op, output_dtype), op,
                  ": output_dtype must be the one that the weight was packed with, got ",
                  dtype_text(output_dtype));
  std::vector<int64_t> sizes = sizes_of(input);
  sizes.back() = out_features;
  const bool residual_signed = check_residual_cuda(op, residual, facts, sizes, input);

  const torch::stable::accelerator::DeviceGuard guard(guarded_device(op, input));
  const CudaMachine machine = current_machine(op);
  Tensor out = empty(input, sizes, output_dtype);
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
  if (rows == 0 || out_features == 0) return out;
  check_launch_size(op, rows, out_features);
  const Rows a = as_rows(input);
  const std::optional<Rows> r =
      residual.has_value() ? std::optional(as_rows(*residual)) : std::nullopt;
  LinearCudaArgs args{
      .packed = packed.const_data_ptr(),
      .facts = facts,
      .n = out_features,
      .depth = depth,
      .input = static_cast<const uint8_t*>(a.owner.const_data_ptr()),
      .rows = rows,
      .input_row_stride = a.stride,
      .out = out.mutable_data_ptr(),
      .residual = r ? static_cast<const uint8_t*>(r->owner.const_data_ptr()) : nullptr,
      .residual_row_stride = r ? r->stride : 0,
      .residual_signed = residual_signed,
      .workspace = nullptr};
  const Tensor workspace = empty(input, {linear_cuda_workspace(args, machine)}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  check_launch(op, linear_cuda(args, plan_linear_cuda(args, machine),
                               current_stream(input.get_device_index())));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace qk::seam
