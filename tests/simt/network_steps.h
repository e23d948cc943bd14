// A step of a network on both devices: by the CPU's kernels, and by the CUDA kernels on the
// emulator, called as python/*.cpp and python/cuda/*.cpp call them. Brings the CUDA kernels along.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "csrc/conv/cuda.cu"
#include "csrc/conv/cuda_s8.cu"
#include "csrc/conv/cuda_u8.cu"
#include "csrc/gemm/cuda.cu"
#include "csrc/gemm/cuda_s8.cu"
#include "csrc/gemm/cuda_u8.cu"
#include "csrc/gemm/cuda_wgmma_sm90a.cu"
#include "csrc/gemm/linear.h"
#include "csrc/pointwise/cuda.cu"
#include "csrc/pool/cuda.cu"
#include "csrc/quantize/cuda.cu"
#include "csrc/quantize/quantize.h"
#include "tests/simt/network_values.h"

namespace qk::test {

// They start out different, so that an element that no kernel writes is a difference.
struct Results {
  Activation cpu, cuda;

  explicit Results(const View& out)
      : cpu(new_activation(out, 0x5a)), cuda(new_activation(out, 0xa5)) {}
};

// An operation whose arguments are the same on both devices.
template <typename Args>
Results on_both(Args args, const View& out, void (*cpu)(const Args&, const Parallel&),
                cudaError_t (*cuda)(const Args&, cudaStream_t)) {
  Results results(out);
  args.out = results.cpu.data();
  cpu(args, kSerial);
  args.out = results.cuda.data();
  CHECK_EQ(cuda(args, nullptr), cudaSuccess);
  return results;
}

// The grids of a weight: scale and zero point of equal length.
struct WeightGrid {
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  bool per_tensor;

  WeightGrid(const plan::Model& model, const plan::WeightedStep& s) {
    const plan::Tensor& scales = model.tensors[s.weight_scale];
    scale.assign(scales.f32(), scales.f32() + scales.elements);
    if (s.weight_zero_point >= 0) {
      const plan::Tensor& points = model.tensors[s.weight_zero_point];
      zero_point.assign(points.s32(), points.s32() + points.elements);
      const size_t longest = std::max(scale.size(), zero_point.size());
      scale.resize(longest, scale[0]);
      zero_point.resize(longest, zero_point[0]);
    }
    per_tensor = scale.size() == 1 && s.conv.out_channels != 1;
  }
};

class StepRunner {
 public:
  explicit StepRunner(const plan::Model& model) : model_(model) {}

  // The CUDA kernels of weighted layers that have run, by the type of their input.
  const std::set<std::string>& kernels() const { return kernels_; }

  // `out`: sizes, strides and dtype of the result.
  Results run(const Step& step, const std::vector<Activation>& inputs, const View& out) {
    switch (step.kind) {
      case StepKind::kQuantize:
        return quantize(step.as<plan::QuantizeStep>(), inputs[0], out);
      case StepKind::kDequantize:
        return dequantize(step.as<plan::QuantizeStep>(), inputs[0], out);
      case StepKind::kLinear:
        return linear(step, inputs, out);
      case StepKind::kConv:
        return conv(step, inputs, out);
      case StepKind::kAdd:
      case StepKind::kMul:
        return binary(step, inputs[0], inputs[1], out);
      case StepKind::kCat:
        return cat(step.as<plan::CatStep>(), inputs, out);
      case StepKind::kLookup:
        return lookup(step.as<plan::LookupStep>(), inputs[0], out);
      case StepKind::kMaxPool: {
        const Activation q = as_channels_last(inputs[0]);
        const MaxPoolArgs args{q.data(), nullptr, q.is_signed(), pool_geometry(step, q, out)};
        return on_both(args, out, max_pool, max_pool_cuda);
      }
      default:
        return mean(step, inputs[0], out);
    }
  }

 private:
  // ---- floats and codes

  static FloatType float_type(DType dtype) {
    return dtype == DType::kF32    ? FloatType::kFloat32
           : dtype == DType::kBF16 ? FloatType::kBFloat16
                                   : FloatType::kFloat16;
  }
  GridLayout grid_layout(const plan::QuantizeStep& s, Activation* x, const View& out) const {
    GridLayout grid;
    grid.strided = walk_over<1>(out, {x}, false, s.axis, &grid.channel_dim);
    grid.scale = model_.tensors[s.scale].f32();
    grid.zero_point = model_.tensors[s.zero_point].s32();
    return grid;
  }
  DenseGrid dense_grid(const plan::QuantizeStep& s, const View& out) const {
    DenseGrid grid{model_.tensors[s.scale].f32(), model_.tensors[s.zero_point].s32(),
                   out.size.elements(), 1, 1};
    if (s.axis < 0 || out.size[s.axis] == 1) return grid;
    grid.channels = out.size[s.axis];
    grid.inner = out.stride[s.axis];
    return grid;
  }

  Results quantize(const plan::QuantizeStep& s, Activation x, const View& out) const {
    Results results(out);
    const FloatType type = float_type(x.view.dtype);
    const GridLayout grid = grid_layout(s, &x, out);
    qk::quantize(
        {x.data(), type, results.cpu.data(), results.cpu.is_signed(), s.qmin, s.qmax, grid},
        kSerial);
    const Activation dense = with_strides(x, out);
    CHECK_EQ(
        quantize_cuda({dense.data(), type, results.cuda.data(), s.qmin, s.qmax, dense_grid(s, out)},
                      nullptr),
        cudaSuccess);
    return results;
  }

  Results dequantize(const plan::QuantizeStep& s, Activation q, const View& out) const {
    Results results(out);
    const CodeType type = q.is_signed() ? CodeType::kInt8 : CodeType::kUInt8;
    const FloatType to = float_type(out.dtype);
    const GridLayout grid = grid_layout(s, &q, out);
    qk::dequantize({q.data(), type, results.cpu.data(), to, grid}, kSerial);
    const Activation dense = with_strides(q, out);
    CHECK_EQ(
        dequantize_cuda({dense.data(), type, results.cuda.data(), to, dense_grid(s, out)}, nullptr),
        cudaSuccess);
    return results;
  }

  // ---- linear and convolution

  Epilogue epilogue_of(const plan::WeightedStep& s, DType output) const {
    Epilogue e;
    e.output = static_cast<OutputType>(output);
    if (!e.is_8bit()) return e;
    e.zero_point = s.output.zero_point, e.qmin = s.output.qmin, e.qmax = s.output.qmax;
    e.has_table = s.table >= 0, e.has_residual = s.has_residual;
    if (s.table >= 0) std::copy_n(model_.tensors[s.table].data, 256, e.table);
    if (!s.has_residual) return e;
    e.residual = {.scale = s.output.scale,
                  .offset = add_offset(s.output.scale, s.output.zero_point),
                  .residual_scale = s.residual.scale,
                  .residual_offset = add_offset(s.residual.scale, s.residual.zero_point),
                  .inv_scale = 1.0f / s.sum.scale,
                  .zero_point = s.sum.zero_point,
                  .qmin = s.sum.qmin,
                  .qmax = s.sum.qmax,
                  .residual_zero_point = s.residual.zero_point};
    return e;
  }
  ConvSource source_of(const plan::WeightedStep& s, const WeightGrid& grid, bool input_signed,
                       DType output) const {
    return {.shape = s.conv,
            .weight = reinterpret_cast<const int8_t*>(model_.tensors[s.weight].data),
            .weight_scale = grid.scale.data(),
            .weight_zero_point = grid.zero_point.empty() ? nullptr : grid.zero_point.data(),
            .per_tensor = grid.per_tensor,
            .bias = s.bias < 0 ? nullptr : model_.tensors[s.bias].f32(),
            .input_scale = s.input.scale,
            .input_zero_point = s.input.zero_point,
            .input_signed = input_signed,
            .output_scale = s.output.scale,
            .epilogue = epilogue_of(s, output)};
  }

  static CudaMachine machine() {
    CudaMachine machine;
    CHECK_EQ(cuda_machine(&machine), cudaSuccess);
    return machine;
  }

  Results linear(const Step& step, const std::vector<Activation>& inputs, const View& out) {
    const auto& s = step.as<plan::WeightedStep>();
    const WeightGrid grid(model_, s);
    const ConvSource layer = source_of(s, grid, inputs[0].is_signed(), out.dtype);
    const PackSource source{.weight = layer.weight,
                            .n = s.conv.out_channels,
                            .taps = 1,
                            .depth = s.conv.in_channels,
                            .stride_n = s.conv.in_channels,
                            .stride_tap = 0,
                            .stride_k = 1,
                            .weight_scale = layer.weight_scale,
                            .weight_zero_point = layer.weight_zero_point,
                            .per_tensor = layer.per_tensor,
                            .bias = layer.bias,
                            .input_scale = layer.input_scale,
                            .input_zero_point = layer.input_zero_point,
                            .input_signed = layer.input_signed,
                            .output_scale = layer.output_scale,
                            .epilogue = layer.epilogue};
    const Rows x(inputs[0]);
    const auto residual = s.has_residual ? std::optional<Rows>(inputs[1]) : std::nullopt;
    Results results(out);
    linear_on_cpu(source, x, residual, results.cpu);
    linear_on_cuda(source, x, residual, results.cuda);
    return results;
  }

  template <typename Args>
  static void set_residual(const std::optional<Rows>& residual, Args* args) {
    if (!residual) return;
    args->residual = residual->owner.data(), args->residual_row_stride = residual->stride;
    args->residual_signed = residual->owner.is_signed();
  }

  static void linear_on_cpu(const PackSource& source, const Rows& x,
                            const std::optional<Rows>& residual, const Activation& out) {
    const int64_t bytes = packed_igemm_bytes(source.n, 1, source.depth, isa_active());
    const auto packed = allocate(bytes);
    CHECK_EQ(pack_igemm(source, isa_active(), packed.get()), Status::kOk);
    LinearArgs args{};
    CHECK_EQ(view_packed(packed.get(), bytes, &args.matrix), Status::kOk);
    args.input = x.owner.data(), args.rows = x.count, args.input_row_stride = x.stride;
    args.out = out.data();
    set_residual(residual, &args);
    qk::linear(args, kSerial);
  }

  void linear_on_cuda(const PackSource& source, const Rows& x, const std::optional<Rows>& residual,
                      const Activation& out) {
    const int64_t bytes = packed_cuda_bytes(source.n, 1, source.depth, cuda_packed_facts(source));
    const auto packed = allocate(bytes);
    CHECK_EQ(pack_igemm_cuda(source, packed.get()), Status::kOk);
    LinearCudaArgs args{};
    CHECK_EQ(read_cuda_facts(bytes, source.n, 1, source.depth, &args.facts), Status::kOk);
    args.packed = packed.get(), args.n = source.n, args.depth = source.depth;
    args.input = x.owner.data(), args.rows = x.count, args.input_row_stride = x.stride;
    args.out = out.data();
    set_residual(residual, &args);
    note_linear(args);
    const auto workspace = allocate(linear_cuda_workspace(args, machine()));
    args.workspace = workspace.get();
    CHECK_EQ(linear_cuda(args, plan_linear_cuda(args, machine()), nullptr), cudaSuccess);
  }

  Results conv(const Step& step, const std::vector<Activation>& inputs, const View& out) {
    const auto& s = step.as<plan::WeightedStep>();
    const WeightGrid grid(model_, s);
    const ConvSource source = source_of(s, grid, inputs[0].is_signed(), out.dtype);
    const Activation x = as_channels_last(inputs[0]);
    const Activation residual = s.has_residual ? as_channels_last(inputs[1]) : Activation{};
    ConvExtent extent;
    extent.batch = x.size()[0];
    for (int d = 0; d < kConvDims; ++d) {
      extent.in[d] = spatial_size(x.size(), d), extent.out[d] = spatial_size(out.size, d);
    }
    Results results(out);
    conv_on_cpu(source, extent, x, residual, results.cpu);
    conv_on_cuda(source, extent, x, residual, results.cuda);
    return results;
  }

  static void conv_on_cpu(const ConvSource& source, const ConvExtent& extent, const Activation& x,
                          const Activation& residual, const Activation& out) {
    const int64_t bytes = packed_conv_bytes(source, isa_active());
    const auto packed = allocate(bytes);
    CHECK_EQ(pack_conv(source, isa_active(), packed.get()), Status::kOk);
    ConvArgs args;
    CHECK_EQ(view_packed_conv(packed.get(), bytes, &args.packed), Status::kOk);
    args.extent = extent;
    args.input = x.data(), args.out = out.data();
    args.residual = residual.memory ? residual.data() : nullptr;
    args.residual_signed = residual.is_signed();
    const auto workspace = allocate(conv_workspace_bytes(args, kSerial));
    args.workspace = workspace.get();
    qk::conv(args, kSerial);
  }

  void conv_on_cuda(const ConvSource& source, const ConvExtent& extent, const Activation& x,
                    const Activation& residual, const Activation& out) {
    const int64_t bytes = packed_conv_cuda_bytes(source.shape, conv_cuda_facts(source));
    const auto packed = allocate(bytes);
    CHECK_EQ(pack_conv_cuda(source, packed.get()), Status::kOk);
    ConvCudaArgs args{};
    CHECK_EQ(read_conv_cuda_facts(bytes, source.shape, &args.facts), Status::kOk);
    args.shape = source.shape, args.extent = extent;
    args.packed = packed.get(), args.input = x.data(), args.out = out.data();
    args.residual = residual.memory ? residual.data() : nullptr;
    args.residual_signed = residual.is_signed();
    CHECK(conv_cuda_fits(args));
    note_conv(args);
    const auto workspace = allocate(conv_cuda_workspace(args, machine()));
    args.workspace = workspace.get();
    CHECK_EQ(conv_cuda(args, machine(), nullptr), cudaSuccess);
  }

  // ---- which kernel it is: the decisions of csrc/gemm/cuda.cu and csrc/conv/cuda.cu

  void note(const char* kernel, bool input_signed) {
    kernels_.insert(std::string(kernel) + (input_signed ? ", s8" : ", u8"));
  }
  void note_linear(const LinearCudaArgs& args) {
    note(args.rows <= kCudaGemvRows                     ? "linear: dot products"
         : is_general(args)                             ? "linear: gathered bytes"
         : plan_linear_cuda(args, machine()).splits > 1 ? "linear: tiles, K split"
                                                        : "linear: tiles",
         args.facts.input_signed);
  }
  void note_conv(const ConvCudaArgs& args) {
    if (is_pointwise(args)) return note_linear(pointwise_args(args));
    const bool input_signed = args.facts.input_signed;
    if (!phases_cover_output(args.shape)) note("conv: fill", input_signed);
    for_each_part(args, [&](const ConvCudaPart& part) {
      const cuda::PixelSource source = pixel_source(args, part);
      note(part.depthwise                                ? "conv: depthwise"
           : is_narrow(args)                             ? "conv: narrow groups"
           : source.runs                                 ? "conv: rows of the window"
           : is_general(args, source)                    ? "conv: gathered bytes"
           : plan_part(args, part, machine()).splits > 1 ? "conv: tiles, K split"
                                                         : "conv: tiles",
           input_signed);
      return cudaSuccess;
    });
  }

  // ---- elementwise

  Results binary(const Step& step, Activation a, Activation b, const View& out) const {
    const auto& s = step.as<plan::BinaryStep>();
    BinaryArgs args{};
    args.op = step.kind == StepKind::kAdd ? BinaryOp::kAdd : BinaryOp::kMul;
    args.grid = {.a_signed = a.is_signed(),
                 .b_signed = b.is_signed(),
                 .out_signed = out.dtype == DType::kS8,
                 .a_scale = s.a.scale,
                 .b_scale = s.b.scale,
                 .out_scale = s.output.scale,
                 .a_zero_point = s.a.zero_point,
                 .b_zero_point = s.b.zero_point,
                 .out_zero_point = s.output.zero_point,
                 .qmin = s.output.qmin,
                 .qmax = s.output.qmax};
    args.layout = walk_over<2>(out, {&a, &b}, true);
    args.a = a.data(), args.b = b.data();
    return on_both(args, out, qk::binary, binary_cuda);
  }

  Results lookup(const plan::LookupStep& s, Activation q, const View& out) const {
    LookupArgs args{};
    args.layout = walk_over<1>(out, {&q}, false);
    args.q = q.data(), args.table = model_.tensors[s.table].data;
    return on_both(args, out, qk::lookup, lookup_cuda);
  }

  Results cat(const plan::CatStep& s, const std::vector<Activation>& inputs,
              const View& out) const {
    const bool pixels = std::all_of(inputs.begin(), inputs.end(), [](const Activation& x) {
      return plan::is_channels_last(x.view);
    });
    // Bytes that belong to one index of the dimension, and rows of all such bytes.
    int64_t inner = 1, rows = 1;
    for (int d = 0; d < out.rank(); ++d) {
      const bool inside = pixels ? s.dim != 1 && (d == 1 || d > s.dim) : d > s.dim;
      if (d != s.dim) (inside ? inner : rows) *= out.size[d];
    }
    std::vector<Activation> owners;
    std::vector<CatInput> parts;
    for (const Activation& x : inputs) {
      owners.push_back(pixels ? x : as_contiguous(x));
      parts.push_back({owners.back().data(), x.size()[s.dim] * inner,
                       model_.tensors[s.tables].data + 256 * parts.size()});
    }
    const CatArgs args{parts.data(), static_cast<int64_t>(parts.size()), nullptr, rows};
    return on_both(args, out, qk::cat, cat_cuda);
  }

  // ---- pools

  static PoolGeometry pool_geometry(const Step& step, const Activation& q, const View& out) {
    const auto& s = step.as<plan::PoolStep>();
    PoolGeometry g{};
    g.batch = q.size()[0], g.channels = q.size()[1];
    g.adaptive = step.kind == StepKind::kAdaptiveAvgPool;
    for (int d = 0; d < 3; ++d) {
      g.in[d] = spatial_size(q.size(), d), g.out[d] = spatial_size(out.size, d);
      g.kernel[d] = s.kernel[d], g.stride[d] = s.stride[d];
      g.padding[d] = s.padding[d], g.dilation[d] = s.dilation[d];
    }
    return g;
  }

  Results mean(const Step& step, const Activation& input, const View& out) const {
    const auto& s = step.as<plan::PoolStep>();
    const Activation q = as_channels_last(input);
    const AvgPoolArgs args{.q = q.data(),
                           .out = nullptr,
                           .q_signed = q.is_signed(),
                           .out_signed = out.dtype == DType::kS8,
                           .geometry = pool_geometry(step, q, out),
                           .count_include_pad = s.count_include_pad,
                           .divisor = s.divisor,
                           .scale_ratio = s.input.scale / s.output.scale,
                           .q_zero_point = s.input.zero_point,
                           .out_zero_point = s.output.zero_point,
                           .qmin = s.output.qmin,
                           .qmax = s.output.qmax};
    return on_both(args, out, avg_pool, avg_pool_cuda);
  }

  const plan::Model& model_;
  std::set<std::string> kernels_;
};

}  // namespace qk::test
