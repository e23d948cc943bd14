// Every op of qkernels, one schema each. Activations and weights are plain int8/uint8 tensors; a
// grid is a scale (float32, > 0, normal) and a zero point in [qmin, qmax]. qkernels/ops documents
// the arguments.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(qkernels, m) {
  // Float and integer grids. axis None: per tensor (scale, zero_point have one element); else one
  // element a channel.
  m.def(
      "quantize(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "quantize_out(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, "
      "Tensor(a!) out) -> ()");
  m.def(
      "dequantize(Tensor q, Tensor scale, Tensor zero_point, int? axis, ScalarType dtype) -> "
      "Tensor");
  m.def(
      "dequantize_out(Tensor q, Tensor scale, Tensor zero_point, int? axis, Tensor(a!) out) -> ()");
  m.def(
      "fake_quant(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax) -> "
      "Tensor");
  m.def(
      "fake_quant_out(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, "
      "Tensor(a!) out) -> ()");

  // Training: gradients of fake_quant, and learned grids (lsq; zero_point is float32, rounded
  // inside).
  m.def(
      "fake_quant_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int? axis, int "
      "qmin, int qmax) -> Tensor");
  m.def(
      "fake_quant_backward_out(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int? axis, "
      "int qmin, int qmax, Tensor(a!) out) -> ()");
  m.def(
      "fake_quant_mask(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, "
      "ScalarType? code_dtype=None, float? floor=None, float? ceiling=None) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def("fake_quant_mask_backward(Tensor grad, Tensor mask, int? axis) -> Tensor");
  m.def(
      "lsq_out(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, "
      "Tensor(a!) "
      "out) -> ()");
  m.def(
      "lsq(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, float "
      "grad_factor) -> Tensor");
  m.def(
      "lsq_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, "
      "int qmax, float grad_factor) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lsq_backward_out(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int? axis, int "
      "qmin, int qmax, float grad_factor, Tensor(a!) out) -> (Tensor, Tensor)");

  // Other training rules: PACT, DoReFa, binary (qkernels/ops/rules.py).
  m.def("pact(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax) -> Tensor");
  m.def(
      "pact_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, "
      "int qmax) -> (Tensor, Tensor)");
  m.def("dorefa_weight(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax) -> Tensor");
  m.def(
      "dorefa_weight_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int qmin, "
      "int "
      "qmax) -> Tensor");
  m.def("dorefa_gradient(Tensor grad, Tensor seed, int bits) -> Tensor");

  // Observers: extremes of a tensor, and the state of an observer with the grid that follows from
  // it (qkernels/ops/observe.py).
  m.def("observe_minmax(Tensor x, int? axis) -> (Tensor, Tensor, Tensor)");
  m.def(
      "observe(Tensor x, Tensor(a!) low, Tensor(b!) high, Tensor(c!) scale, Tensor(d!) zero_point, "
      "Tensor(e!)? non_finite, int? axis, int qmin, int qmax, bool symmetric, float min_scale, "
      "float? momentum, str source, float? floor=None, float? ceiling=None) -> ()");
  m.def(
      "observe_fake_quant_out(Tensor x, Tensor(a!) low, Tensor(b!) high, Tensor(c!) scale, "
      "Tensor(d!) zero_point, Tensor(e!)? non_finite, int? axis, int qmin, int qmax, bool "
      "symmetric, float min_scale, float? momentum, str source, Tensor(f!) out) -> Tensor");
  m.def(
      "observe_histogram(Tensor x, Tensor batch_low, Tensor batch_high, Tensor(a!) low, Tensor(b!) "
      "high, Tensor(c!) histogram) -> ()");

  // Batch normalization in training and the grid behind it (qkernels/ops/batch_norm.py).
  m.def(
      "batch_norm_statistics(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "norm_fake_quant(Tensor x, Tensor factor, Tensor shift, Tensor scale, Tensor zero_point, int "
      "qmin, int qmax, float? floor, float? ceiling, ScalarType? code_dtype) -> (Tensor, Tensor)");
  m.def(
      "norm_fake_quant_backward(Tensor grad, Tensor x, Tensor mean, Tensor inv_std, Tensor factor, "
      "Tensor shift, Tensor scale, Tensor zero_point, int qmin, int qmax, float? floor, float? "
      "ceiling, float? grad_factor) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Many tensors in one call (all weights of a model); axis -1: per tensor.
  m.def(
      "foreach_fake_quant(Tensor[] xs, Tensor[] scales, Tensor[] zero_points, int[] axes, int "
      "qmin, int qmax) -> Tensor[]");
  m.def(
      "foreach_fake_quant_backward(Tensor[] grads, Tensor[] xs, Tensor[] scales, Tensor[] "
      "zero_points, int[] axes, int qmin, int qmax) -> Tensor[]");
  m.def(
      "foreach_observe_fake_quant(Tensor[] xs, int[] axes, int qmin, int qmax, bool symmetric, "
      "float min_scale, ScalarType? code_dtype) -> (Tensor[], Tensor[], Tensor[], Tensor[], "
      "Tensor)");

  // Linear and convolution: *_pack makes an opaque uint8 tensor for the active ISA that holds the
  // weight, all grids and the epilogue; the run op takes it. epilogue: see
  // qkernels/ops/epilogue.py. geometry: for CUDA, where reading the packed bytes would wait for the
  // device; qkernels/ops/conv.py's conv_geometry().
  m.def(
      "linear_pack(Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
      "float input_scale, "
      "int input_zero_point, ScalarType input_dtype, float[] epilogue, ScalarType output_dtype, "
      "Tensor? table) -> "
      "Tensor");
  m.def(
      "linear(Tensor input, Tensor packed, Tensor? residual, int out_features, ScalarType "
      "output_dtype) -> Tensor");
  m.def(
      "conv_pack(Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
      "float input_scale, "
      "int input_zero_point, ScalarType input_dtype, float[] epilogue, ScalarType output_dtype, "
      "Tensor? table, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool transposed, str padding_mode) "
      "-> Tensor");
  m.def(
      "conv(Tensor input, Tensor packed, Tensor? residual, int out_channels, int[] output_size, "
      "ScalarType output_dtype, int[] geometry=[]) -> Tensor");

  // The packing of a layer that is trained: the grid of its input is tensors, as those of its
  // weight, and the output float32. geometry: as conv's; empty: a linear layer.
  m.def(
      "pack_on_grid(Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
      "Tensor input_scale, Tensor input_zero_point, ScalarType input_dtype, int[] geometry) -> "
      "Tensor");

  // Activations quantized when they arrive, a grid a row (qkernels/ops/rows.py). `packed`:
  // linear_pack's, for an int32 output.
  m.def(
      "quantize_rows(Tensor x, int qmin, int qmax, bool symmetric, ScalarType dtype) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "linear_rows(Tensor input, Tensor packed, Tensor row_scale, Tensor row_zero_point, Tensor "
      "weight_scale, Tensor weight_sum, Tensor? bias, int out_features, ScalarType output_dtype) "
      "-> Tensor");

  // Binary networks: signs with a gradient, packed signs (int64 words) and their products.
  m.def("binary_sign(Tensor x, bool is_weight) -> Tensor");
  m.def("binary_sign_backward(Tensor grad, Tensor x, bool is_weight) -> Tensor");
  m.def("pack_signs(Tensor x, int axis) -> Tensor");
  m.def("binary_weight_pack(Tensor weight) -> Tensor");
  m.def(
      "binary_linear(Tensor input, Tensor packed, Tensor scale, Tensor? bias, int in_features) -> "
      "Tensor");
  m.def(
      "binary_conv2d(Tensor input, Tensor packed, Tensor scale, Tensor? bias, int in_channels, "
      "int[] "
      "kernel_size, int[] stride, int[] padding, int[] dilation) -> Tensor");

  // Elementwise on integers. lookup is every unary op: out = table[q], table uint8/int8 [256]
  // indexed by the byte of q.
  m.def("lookup(Tensor q, Tensor table) -> Tensor");
  m.def(
      "add(Tensor a, Tensor b, float a_scale, int a_zero_point, float b_scale, int b_zero_point, "
      "float scale, "
      "int zero_point, int qmin, int qmax, ScalarType dtype) -> Tensor");
  m.def(
      "mul(Tensor a, Tensor b, float a_scale, int a_zero_point, float b_scale, int b_zero_point, "
      "float scale, "
      "int zero_point, int qmin, int qmax, ScalarType dtype) -> Tensor");
  m.def("cat(Tensor[] tensors, Tensor tables, int dim) -> Tensor");

  // Pooling over the spatial dims of [N, C, *spatial] in channels-last memory.
  m.def(
      "max_pool(Tensor q, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool "
      "ceil_mode) -> Tensor");
  m.def(
      "avg_pool(Tensor q, int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, bool "
      "count_include_pad, "
      "int? divisor_override, float q_scale, int q_zero_point, float scale, int zero_point, int "
      "qmin, int qmax, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "adaptive_avg_pool(Tensor q, int[] output_size, float q_scale, int q_zero_point, float "
      "scale, int zero_point, "
      "int qmin, int qmax, ScalarType dtype) -> Tensor");
}
