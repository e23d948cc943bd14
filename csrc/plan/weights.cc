#include "csrc/plan/weights.h"

#include <cstring>

#include "csrc/conv/conv.h"
#include "csrc/gemm/igemm.h"

namespace qk::plan {
namespace {

// The grids of a weight, as the packers want them: scale and zero point of equal length.
struct WeightGrid {
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  bool per_tensor = false;

  WeightGrid(const Model& model, const WeightedStep& s) {
    const Tensor& scales = model.tensors[s.weight_scale];
    const Tensor* points = s.weight_zero_point < 0 ? nullptr : &model.tensors[s.weight_zero_point];
    int64_t n = scales.elements;
    if (points != nullptr && points->elements > n) n = points->elements;
    per_tensor = n == 1 && s.conv.out_channels != 1;
    for (int64_t i = 0; i < n; ++i) scale.push_back(scales.f32()[scales.elements == 1 ? 0 : i]);
    for (int64_t i = 0; points != nullptr && i < n; ++i) {
      zero_point.push_back(points->s32()[points->elements == 1 ? 0 : i]);
    }
  }
  const int32_t* zero_point_data() const {
    return zero_point.empty() ? nullptr : zero_point.data();
  }
};

Epilogue epilogue_of(const Model& model, const Step& step) {
  const auto& s = step.as<WeightedStep>();
  Epilogue e;
  e.output = static_cast<OutputType>(model.values[step.output].dtype);
  if (!e.is_8bit()) return e;
  e.zero_point = s.output.zero_point;
  e.qmin = s.output.qmin;
  e.qmax = s.output.qmax;
  if (s.table >= 0) {
    e.has_table = 1;
    std::memcpy(e.table, model.tensors[s.table].data, 256);
  }
  if (s.has_residual) {
    e.has_residual = 1;
    e.residual = {.scale = s.output.scale,
                  .offset = add_offset(s.output.scale, s.output.zero_point),
                  .residual_scale = s.residual.scale,
                  .residual_offset = add_offset(s.residual.scale, s.residual.zero_point),
                  .inv_scale = 1.0f / s.sum.scale,
                  .zero_point = s.sum.zero_point,
                  .qmin = s.sum.qmin,
                  .qmax = s.sum.qmax,
                  .residual_zero_point = s.residual.zero_point};
  }
  return e;
}

Error packing_error(const Step& step, Status status) {
  switch (status) {
    case Status::kOk:
      return {};
    case Status::kKTooLarge:
      return error(ErrorKind::kUnsupported, "plan: step '", step.name,
                   "': the int32 accumulator could overflow; split the layer");
    case Status::kBadScale:
      return error(ErrorKind::kUnsupported, "plan: step '", step.name,
                   "': a product of its scales, or a bias divided by it, leaves the float32 range");
    default:
      return error(ErrorKind::kUnsupported, "plan: step '", step.name,
                   "': its weights could not be packed");
  }
}

Error no_memory(const Step& step, int64_t bytes) {
  return error(ErrorKind::kMemory, "plan: no memory for the weights of step '", step.name, "', ",
               bytes, " bytes");
}

}  // namespace

Error pack_weights(const Model& model, const Step& step, Isa isa, Block* packed) {
  const auto& s = step.as<WeightedStep>();
  const WeightGrid grid(model, s);
  const auto* weight = reinterpret_cast<const int8_t*>(model.tensors[s.weight].data);
  const float* bias = s.bias < 0 ? nullptr : model.tensors[s.bias].f32();
  const bool input_signed = model.values[step.inputs[0]].dtype == DType::kS8;
  PackSource linear{.weight = weight,
                    .n = s.conv.out_channels,
                    .taps = s.conv.kernel_size(),
                    .depth = s.conv.in_per_group(),
                    .stride_n = s.conv.in_channels,
                    .stride_tap = 0,
                    .stride_k = 1,
                    .weight_scale = grid.scale.data(),
                    .weight_zero_point = grid.zero_point_data(),
                    .per_tensor = grid.per_tensor,
                    .bias = bias,
                    .input_scale = s.input.scale,
                    .input_zero_point = s.input.zero_point,
                    .input_signed = input_signed,
                    .output_scale = s.output.scale,
                    .epilogue = epilogue_of(model, step),
                    .few_rows = model.values[step.inputs[0]].rank == 2};
  const Status fits = check_accumulator(linear);
  if (fits != Status::kOk) return packing_error(step, fits);
  if (step.kind == StepKind::kLinear) {
    const int64_t bytes = packed_igemm_bytes(linear.n, 1, linear.depth, isa);
    if (!packed->allocate(bytes)) return no_memory(step, bytes);
    return packing_error(step, pack_igemm(linear, isa, packed->data()));
  }
  const ConvSource conv{.shape = s.conv,
                        .weight = weight,
                        .weight_scale = linear.weight_scale,
                        .weight_zero_point = linear.weight_zero_point,
                        .per_tensor = linear.per_tensor,
                        .bias = bias,
                        .input_scale = s.input.scale,
                        .input_zero_point = s.input.zero_point,
                        .input_signed = input_signed,
                        .output_scale = s.output.scale,
                        .epilogue = linear.epilogue};
  const int64_t bytes = packed_conv_bytes(conv, isa);
  if (!packed->allocate(bytes)) return no_memory(step, bytes);
  return packing_error(step, pack_conv(conv, isa, packed->data()));
}

}  // namespace qk::plan
