// Plans and starts convolutions on CUDA, and the direct kernels: depthwise, and groups of a few
// channels.
#include "csrc/conv/cuda.h"

#include "csrc/base/cuda_elementwise.cuh"
#include "csrc/conv/cuda_kernels.cuh"

namespace qk {
namespace {

bool is_aligned(const void* pointer) { return cuda::is_aligned(pointer, 16); }

int64_t phase_pixels(const ConvCudaArgs& args, const ConvPhase& phase) {
  int64_t pixels = 1;
  for (int d = 0; d < kConvDims; ++d) pixels *= phase.dim[d].count(args.extent.out[d]);
  return pixels;
}

bool is_pointwise(const ConvCudaArgs& args) {
  const ConvShape& s = args.shape;
  bool plain = s.groups == 1 && !s.transposed && s.kernel_size() == 1;
  for (int d = 0; d < kConvDims; ++d) {
    plain = plain && s.stride[d] == 1 && s.pad_lo[d] == 0 && s.pad_hi[d] == 0;
  }
  return plain;
}

cuda::PixelSource pixel_source(const ConvCudaArgs& args, const ConvCudaPart& part) {
  cuda::PixelSource s{};
  s.input = args.input;
  s.padding = static_cast<const uint8_t*>(args.packed) + part.offset + part.layout.padding;
  for (int d = 0; d < kConvDims; ++d) {
    const DimPhase& dim = part.phase.dim[d];
    s.in[d] = static_cast<int32_t>(args.extent.in[d]);
    s.out[d] = static_cast<int32_t>(args.extent.out[d]);
    s.count[d] = static_cast<int32_t>(dim.count(args.extent.out[d]));
    s.in_stride[d] = static_cast<int32_t>(dim.in_stride);
    s.in_offset[d] = static_cast<int32_t>(dim.in_offset);
    s.in_dilation[d] = static_cast<int32_t>(dim.in_dilation);
    s.taps[d] = static_cast<int32_t>(dim.taps);
    s.out_first[d] = static_cast<int32_t>(dim.out_first);
    s.out_step[d] = static_cast<int32_t>(dim.out_step);
  }
  s.channels = static_cast<int32_t>(args.shape.in_channels);
  s.group_channels = static_cast<int32_t>(args.shape.in_per_group());
  s.depth = static_cast<int32_t>(part.depth);
  s.chunked_depth = static_cast<int32_t>(cuda_depth(part.depth));
  s.mode = args.shape.padding_mode;
  s.runs = part.runs;
  s.dense_output = part.phase.dense_output();
  s.aligned = is_aligned(args.input) && s.channels % 16 == 0 && s.group_channels % 16 == 0;
  return s;
}

bool is_general(const ConvCudaArgs& args, const cuda::PixelSource& source) {
  return args.facts.weight_zero_points || source.runs || !source.aligned;
}

CudaGemmPlan plan_part(const ConvCudaArgs& args, const ConvCudaPart& part,
                       const CudaMachine& machine) {
  const bool general = is_general(args, pixel_source(args, part));
  return plan_cuda_gemm(args.extent.batch * phase_pixels(args, part.phase),
                        args.shape.out_per_group(), part.layout.row_bytes, args.shape.groups,
                        machine, general ? kGeneralCudaTiles : cuda::kConvCudaTiles);
}

LinearCudaArgs pointwise_args(const ConvCudaArgs& args) {
  return {.packed = args.packed,
          .facts = args.facts,
          .n = args.shape.out_channels,
          .depth = args.shape.in_channels,
          .input = args.input,
          .rows = args.extent.batch * args.extent.in_pixels(),
          .input_row_stride = args.shape.in_channels,
          .out = args.out,
          .residual = args.residual,
          .residual_row_stride = args.shape.out_channels,
          .residual_signed = args.residual_signed,
          .workspace = args.workspace};
}

// ---- elementwise kernels: element i is output channel i % channels of the i / channels-th pixel

struct Outputs {
  const Epilogue* epilogue;
  const float* addend;
  const float* mult;
  OutputType type;
  uint8_t* out;
  const uint8_t* residual;
  bool residual_signed;

  template <int kCount>
  QK_DEVICE void store(int64_t index, int64_t channel, const int32_t (&acc)[kCount]) const {
    const int64_t bytes = output_bytes(type);
    if (bytes == 1) {
      cuda::Vector<uint8_t, kCount> v;
#pragma unroll
      for (int i = 0; i < kCount; ++i) store_one(index + i, channel + i, acc[i], &v.v[i]);
      return cuda::store_vector(out + index, v);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      store_one(index + i, channel + i, acc[i], out + (index + i) * bytes);
    }
  }

 private:
  QK_DEVICE void store_one(int64_t index, int64_t channel, int32_t acc, void* to) const {
    store_output(*epilogue, acc, addend[channel], mult[channel], to,
                 residual ? residual + index : nullptr, residual_signed);
  }
};

struct Depthwise {
  static constexpr int kPerThread = 4;
  cuda::PixelSource source;
  Outputs outputs;
  int32_t channels, multiplier, weight_row;
  const int8_t* weight;  // [tap][weight_row]
  const int32_t* init;
  const int32_t* zero_point;
  bool is_signed;

  void skip_input(int64_t bytes) { source.input += bytes; }
  bool aligned() const {
    return multiplier == 1 && channels % kPerThread == 0 &&
           cuda::is_aligned(source.input, kPerThread) && cuda::is_aligned(outputs.out, kPerThread);
  }

  template <int kCount>
  QK_DEVICE void run(uint32_t first) const {
    const auto wide = static_cast<uint32_t>(channels);
    const int32_t o = static_cast<int32_t>(first % wide);
    const uint32_t m = first / wide;
    const cuda::Pixel pixel = cuda::pixel_of(source, m);
    int32_t acc[kCount], sum[kCount] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) acc[i] = init[o + i];
    const int8_t* w = weight + o;
    int32_t tap[kConvDims];
#pragma unroll 1
    for (tap[0] = 0; tap[0] < source.taps[0]; ++tap[0]) {
#pragma unroll 1
      for (tap[1] = 0; tap[1] < source.taps[1]; ++tap[1]) {
#pragma unroll 1
        for (tap[2] = 0; tap[2] < source.taps[2]; ++tap[2], w += weight_row) {
          const uint8_t* from = cuda::pixel_under(source, pixel, tap);
          const auto a = from == nullptr ? cuda::load_vector<kCount>(source.padding)
                                         : cuda::load_vector<kCount>(from + o / multiplier);
          const auto b = cuda::load_vector<kCount>(w);
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const int32_t value = byte_value(a.v[i], is_signed);
            acc[i] = cuda::wrapping_add(acc[i], value * b.v[i]);
            sum[i] += value;
          }
        }
      }
    }
    if (zero_point != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        acc[i] = cuda::wrapping_add(acc[i], -cuda::wrapping_multiply(sum[i], zero_point[o + i]));
      }
    }
    outputs.store(cuda::output_pixel(source, m) * channels + o, o, acc);
  }
};

// A few channels a group, in words of 4: dot products, where a tile on tensor cores would be mostly
// empty. The weight is that of the tiles.
template <bool kSigned>
struct NarrowGroups {
  static constexpr int kPerThread = 4;
  cuda::PixelSource source;
  Outputs outputs;
  int32_t channels, out_group, words;  // words of an input group
  int64_t weight_row, weight_tap;      // in bytes
  const int8_t* weight;
  const int32_t* init;
  const int32_t* zero_point;

  void skip_input(int64_t bytes) { source.input += bytes; }
  bool aligned() const {
    return out_group % kPerThread == 0 && cuda::is_aligned(outputs.out, kPerThread);
  }

  template <int kCount>
  QK_DEVICE void run(uint32_t first) const {
    const auto wide = static_cast<uint32_t>(channels);
    const int32_t o = static_cast<int32_t>(first % wide);
    const uint32_t m = first / wide;
    const cuda::Pixel pixel = cuda::pixel_of(source, m);
    const int32_t in_group = words * 4, begin = o / out_group * in_group;
    int32_t acc[kCount], sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) acc[i] = init[o + i];
    const int8_t* w = weight + o * weight_row;
    int32_t tap[kConvDims];
#pragma unroll 1
    for (tap[0] = 0; tap[0] < source.taps[0]; ++tap[0]) {
#pragma unroll 1
      for (tap[1] = 0; tap[1] < source.taps[1]; ++tap[1]) {
#pragma unroll 1
        for (tap[2] = 0; tap[2] < source.taps[2]; ++tap[2], w += weight_tap) {
          const uint8_t* pixel_bytes = cuda::pixel_under(source, pixel, tap);
          const uint8_t* from = pixel_bytes == nullptr ? source.padding : pixel_bytes + begin;
#pragma unroll 1
          for (int32_t k = 0; k < in_group; k += 4) {
            const uint32_t a = load_word(from + k);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              acc[i] = cuda::dot4<kSigned>(acc[i], a, load_word(w + i * weight_row + k));
            }
            sum = cuda::dot4<kSigned>(sum, a, 0x01010101u);
          }
        }
      }
    }
    if (zero_point != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        acc[i] = cuda::wrapping_add(acc[i], -cuda::wrapping_multiply(sum, zero_point[o + i]));
      }
    }
    outputs.store(cuda::output_pixel(source, m) * channels + o, o, acc);
  }

 private:
  QK_DEVICE static uint32_t load_word(const void* from) {
    return cuda::load_vector<1>(static_cast<const uint32_t*>(from)).v[0];
  }
};

bool is_narrow(const ConvCudaArgs& args) {
  const int64_t in_group = args.shape.in_per_group();
  return args.shape.groups > 1 && in_group % 4 == 0 && in_group < kCudaChunk &&
         cuda::is_aligned(args.input, 4);
}

// Outputs as if their accumulator were zero: for those that no phase of a transposed convolution
// reaches.
struct Fill {
  static constexpr int kPerThread = 4;
  Outputs outputs;
  int32_t channels;

  void skip_input(int64_t) {}
  bool aligned() const {
    return channels % kPerThread == 0 && cuda::is_aligned(outputs.out, kPerThread);
  }
  template <int kCount>
  QK_DEVICE void run(uint32_t first) const {
    const int32_t acc[kCount] = {};
    outputs.store(first, first % static_cast<uint32_t>(channels), acc);
  }
};

Outputs outputs_of(const ConvCudaArgs& args, const ConvCudaPart& part) {
  const uint8_t* base = static_cast<const uint8_t*>(args.packed) + part.offset;
  return {.epilogue = reinterpret_cast<const Epilogue*>(base),
          .addend = reinterpret_cast<const float*>(base + part.layout.addend),
          .mult = reinterpret_cast<const float*>(base + part.layout.mult),
          .type = args.facts.output,
          .out = static_cast<uint8_t*>(args.out),
          .residual = args.residual,
          .residual_signed = args.residual_signed};
}

// Launches op for as many images at a time as 32-bit indices reach.
template <class Op>
cudaError_t launch_images(const ConvCudaArgs& args, Op op, int64_t elements_an_image,
                          cudaStream_t stream) {
  const int64_t channels = args.shape.out_channels;
  const int64_t in_image = args.extent.in_pixels() * args.shape.in_channels;
  const int64_t out_image = args.extent.out_pixels() * channels;
  const int64_t most = INT32_MAX / (elements_an_image > 0 ? elements_an_image : 1);
  for (int64_t first = 0; first < args.extent.batch; first += most) {
    const int64_t images = args.extent.batch - first < most ? args.extent.batch - first : most;
    const cudaError_t error = cuda::launch_elementwise_32(op, images * elements_an_image, stream);
    if (error != cudaSuccess) return error;
    op.skip_input(images * in_image);
    op.outputs.out += images * out_image * output_bytes(op.outputs.type);
    if (op.outputs.residual != nullptr) op.outputs.residual += images * out_image;
  }
  return cudaSuccess;
}

cudaError_t run_depthwise(const ConvCudaArgs& args, const ConvCudaPart& part, cudaStream_t stream) {
  const uint8_t* base = static_cast<const uint8_t*>(args.packed) + part.offset;
  const auto terms = [base](int64_t offset) {
    return reinterpret_cast<const int32_t*>(base + offset);
  };
  const int64_t channels = args.shape.out_channels;
  const Depthwise op{
      .source = pixel_source(args, part),
      .outputs = outputs_of(args, part),
      .channels = static_cast<int32_t>(channels),
      .multiplier = static_cast<int32_t>(args.shape.out_per_group()),
      .weight_row = static_cast<int32_t>(cuda_depth(channels)),
      .weight = reinterpret_cast<const int8_t*>(base + part.layout.weight),
      .init = terms(part.layout.init),
      .zero_point = args.facts.weight_zero_points ? terms(part.layout.zero_point) : nullptr,
      .is_signed = args.facts.input_signed};
  return launch_images(args, op, phase_pixels(args, part.phase) * channels, stream);
}

template <bool kSigned>
cudaError_t run_narrow(const ConvCudaArgs& args, const ConvCudaPart& part, cudaStream_t stream) {
  const uint8_t* base = static_cast<const uint8_t*>(args.packed) + part.offset;
  const auto terms = [base](int64_t offset) {
    return reinterpret_cast<const int32_t*>(base + offset);
  };
  const int64_t channels = args.shape.out_channels;
  const NarrowGroups<kSigned> op{
      .source = pixel_source(args, part),
      .outputs = outputs_of(args, part),
      .channels = static_cast<int32_t>(channels),
      .out_group = static_cast<int32_t>(args.shape.out_per_group()),
      .words = static_cast<int32_t>(args.shape.in_per_group() / 4),
      .weight_row = part.layout.row_bytes,
      .weight_tap = cuda_depth(part.depth),
      .weight = reinterpret_cast<const int8_t*>(base + part.layout.weight),
      .init = terms(part.layout.init),
      .zero_point = args.facts.weight_zero_points ? terms(part.layout.zero_point) : nullptr};
  return launch_images(args, op, phase_pixels(args, part.phase) * channels, stream);
}

cudaError_t run_gemm(const ConvCudaArgs& args, const ConvCudaPart& part, const CudaMachine& machine,
                     cudaStream_t stream) {
  const cuda::PixelSource source = pixel_source(args, part);
  const CudaGemmPlan plan = plan_part(args, part, machine);
  const IgemmCudaArgs k =
      igemm_cuda_args({.packed = static_cast<const uint8_t*>(args.packed) + part.offset,
                       .layout = part.layout,
                       .facts = args.facts,
                       .m = args.extent.batch * phase_pixels(args, part.phase),
                       .n = args.shape.out_channels,
                       .groups = args.shape.groups,
                       .out = args.out,
                       .residual = args.residual,
                       .residual_row_stride = args.shape.out_channels,
                       .residual_signed = args.residual_signed,
                       .workspace = args.workspace},
                      plan);
  if (const cudaError_t error = clear_arrivals(k, stream); error != cudaSuccess) return error;
  const auto start = args.facts.input_signed ? cuda::launch_conv_s8 : cuda::launch_conv_u8;
  return start(k, source, is_general(args, source) ? -1 : plan.tile, stream);
}

// Calls f(part) for each part with outputs until one gives an error.
template <typename F>
cudaError_t for_each_part(const ConvCudaArgs& args, const F& f) {
  int64_t end = 0;
  for (int64_t i = 0; i < conv_phase_count(args.shape); ++i) {
    const ConvCudaPart part = conv_cuda_part(args.shape, i, end);
    end = part.end();
    if (phase_pixels(args, part.phase) == 0) continue;
    if (const cudaError_t error = f(part); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

bool conv_cuda_fits(const ConvCudaArgs& args) {
  const int64_t out_pixels = args.extent.out_pixels(), channels = args.shape.out_channels;
  const int64_t in_row = args.extent.in[2] * args.shape.in_channels;
  bool fits = args.extent.batch * out_pixels < INT32_MAX && in_row < INT32_MAX &&
              out_pixels * channels < INT32_MAX;
  for (int d = 0; d < kConvDims; ++d) {
    const int64_t reach = args.shape.kernel[d] * args.shape.dilation[d] + args.shape.pad_lo[d];
    fits = fits && args.extent.in[d] + args.shape.pad_hi[d] + reach < INT32_MAX;
  }
  return fits && (is_cuda_depthwise(args.shape) || args.shape.groups <= 65535);
}

int64_t conv_cuda_workspace(const ConvCudaArgs& args, const CudaMachine& machine) {
  if (args.extent.batch == 0 || is_cuda_depthwise(args.shape) || is_narrow(args)) return 0;
  if (is_pointwise(args)) return linear_cuda_workspace(pointwise_args(args), machine);
  int64_t most = 0;
  for_each_part(args, [&](const ConvCudaPart& part) {
    const int64_t bytes = cuda_gemm_workspace(plan_part(args, part, machine),
                                              args.extent.batch * phase_pixels(args, part.phase),
                                              args.shape.out_per_group(), args.shape.groups);
    most = bytes > most ? bytes : most;
    return cudaSuccess;
  });
  return most;
}

cudaError_t conv_cuda(const ConvCudaArgs& args, const CudaMachine& machine, cudaStream_t stream) {
  if (args.extent.batch == 0) return cudaSuccess;
  if (is_pointwise(args)) {
    const LinearCudaArgs linear = pointwise_args(args);
    return linear_cuda(linear, plan_linear_cuda(linear, machine), stream);
  }
  if (!phases_cover_output(args.shape)) {
    const Fill fill{outputs_of(args, conv_cuda_part(args.shape, 0, 0)),
                    static_cast<int32_t>(args.shape.out_channels)};
    const int64_t image = args.extent.out_pixels() * args.shape.out_channels;
    if (const cudaError_t error = launch_images(args, fill, image, stream); error != cudaSuccess) {
      return error;
    }
  }
  return for_each_part(args, [&](const ConvCudaPart& part) {
    if (part.depthwise) return run_depthwise(args, part, stream);
    if (is_narrow(args)) {
      return args.facts.input_signed ? run_narrow<true>(args, part, stream)
                                     : run_narrow<false>(args, part, stream);
    }
    return run_gemm(args, part, machine, stream);
  });
}

}  // namespace qk
