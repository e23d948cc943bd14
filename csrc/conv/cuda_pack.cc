#include "csrc/conv/cuda_pack.h"

#include <cstring>
#include <vector>

#include "csrc/base/integers.h"

namespace qk {
namespace {

// Where torch's weight has output channel o, input channel c of its group, kernel tap `tap`.
int64_t weight_at(const ConvShape& s, int64_t o, int64_t c, int64_t tap) {
  const int64_t in_group = s.in_per_group(), out_group = s.out_per_group();
  if (!s.transposed) return (o * in_group + c) * s.kernel_size() + tap;
  const int64_t row = (o / out_group * in_group + c) * out_group + o % out_group;
  return row * s.kernel_size() + tap;
}

// The weight of a part as [output channel][tap of the phase][channel], whose taps in turn are
// [t0][t1][t2]: runs differ from it in name only.
std::vector<int8_t> phase_weight(const ConvSource& source, const ConvPhase& phase) {
  const ConvShape& s = source.shape;
  std::vector<int8_t> values;
  for (int64_t o = 0; o < s.out_channels; ++o) {
    for (int64_t t0 = 0; t0 < phase.dim[0].taps; ++t0) {
      for (int64_t t1 = 0; t1 < phase.dim[1].taps; ++t1) {
        for (int64_t t2 = 0; t2 < phase.dim[2].taps; ++t2) {
          const int64_t k0 = phase.dim[0].kernel_first + t0 * phase.dim[0].kernel_step;
          const int64_t k1 = phase.dim[1].kernel_first + t1 * phase.dim[1].kernel_step;
          const int64_t k2 = phase.dim[2].kernel_first + t2 * phase.dim[2].kernel_step;
          const int64_t tap = (k0 * s.kernel[1] + k1) * s.kernel[2] + k2;
          for (int64_t c = 0; c < s.in_per_group(); ++c) {
            values.push_back(source.weight[weight_at(s, o, c, tap)]);
          }
        }
      }
    }
  }
  return values;
}

Status pack_part(const ConvSource& source, const ConvCudaPart& part, uint8_t* dst) {
  const std::vector<int8_t> weight = phase_weight(source, part.phase);
  const int64_t channels = source.shape.out_channels;
  const PackSource gemm{.weight = weight.data(),
                        .n = channels,
                        .taps = part.taps,
                        .depth = part.depth,
                        .stride_n = part.taps * part.depth,
                        .stride_tap = part.depth,
                        .stride_k = 1,
                        .weight_scale = source.weight_scale,
                        .weight_zero_point = source.weight_zero_point,
                        .per_tensor = source.per_tensor,
                        .bias = source.bias,
                        .input_scale = source.input_scale,
                        .input_zero_point = source.input_zero_point,
                        .input_signed = source.input_signed,
                        .output_scale = source.output_scale,
                        .epilogue = source.epilogue};
  std::vector<uint8_t> packed(static_cast<size_t>(
      packed_cuda_bytes(channels, part.taps, part.depth, cuda_packed_facts(gemm))));
  if (const Status status = pack_igemm_cuda(gemm, packed.data()); status != Status::kOk) {
    return status;
  }
  if (!part.depthwise) {
    std::memcpy(dst, packed.data(), static_cast<size_t>(part.bytes));
    return Status::kOk;
  }
  std::memcpy(dst, packed.data(), static_cast<size_t>(part.layout.weight));
  for (int64_t tap = 0; tap < part.taps; ++tap) {
    for (int64_t o = 0; o < channels; ++o) {
      dst[part.layout.weight + tap * cuda_depth(channels) + o] =
          static_cast<uint8_t>(weight[static_cast<size_t>(o * part.taps + tap)]);
    }
  }
  return Status::kOk;
}

int64_t parts_bytes(const ConvShape& shape) {
  int64_t end = 0;
  for (int64_t i = 0; i < conv_phase_count(shape); ++i) end = conv_cuda_part(shape, i, end).end();
  return end;
}

int64_t fingerprint_of(const ConvShape& s) {
  uint64_t geometry = 0;  // and stays so for one tap: a linear layer
  const auto add = [&geometry](int64_t number) {
    geometry = geometry * 1000003 + static_cast<uint64_t>(number);
  };
  for (int d = 0; d < kConvDims; ++d) {
    add(s.kernel[d] - 1), add(s.stride[d] - 1), add(s.dilation[d] - 1);
    add(s.pad_lo[d]), add(s.pad_hi[d]);
  }
  add(s.groups - 1), add(s.transposed), add(static_cast<int64_t>(s.padding_mode));
  return cuda_fingerprint(s.out_channels, s.in_per_group(), geometry);
}

}  // namespace

ConvCudaPart conv_cuda_part(const ConvShape& shape, int64_t index, int64_t offset) {
  ConvCudaPart part{};
  part.phase = conv_phase(shape, index);
  part.depthwise = is_cuda_depthwise(shape);
  part.offset = offset;
  const int64_t rows = part.phase.dim[0].taps * part.phase.dim[1].taps;
  const int64_t columns = part.phase.dim[2].taps, channels = shape.in_per_group();
  part.runs = shape.groups == 1 && columns > 1 && part.phase.dim[2].in_dilation == 1 &&
              channels % kCudaChunk != 0;
  part.taps = part.runs ? rows : rows * columns;
  part.depth = part.runs ? columns * channels : channels;
  part.layout = cuda_packed_layout(shape.out_channels, part.taps, part.depth);
  part.bytes =
      part.depthwise
          ? align_up(part.layout.weight + part.taps * cuda_depth(shape.out_channels), kPackedAlign)
          : part.layout.bytes;
  return part;
}

CudaPackedFacts conv_cuda_facts(const ConvSource& source) {
  return {.output = source.epilogue.output,
          .input_signed = source.input_signed,
          .weight_zero_points = source.weight_zero_point != nullptr,
          .residual = source.epilogue.has_residual != 0};
}

int64_t packed_conv_cuda_bytes(const ConvShape& shape, const CudaPackedFacts& facts) {
  return cuda_packed_length(parts_bytes(shape), fingerprint_of(shape), facts);
}

Status pack_conv_cuda(const ConvSource& source, void* dst) {
  auto* bytes = static_cast<uint8_t*>(dst);
  const int64_t size = packed_conv_cuda_bytes(source.shape, conv_cuda_facts(source));
  std::memset(bytes, 0, static_cast<size_t>(size));
  int64_t end = 0;
  for (int64_t i = 0; i < conv_phase_count(source.shape); ++i) {
    const ConvCudaPart part = conv_cuda_part(source.shape, i, end);
    const Status status = pack_part(source, part, bytes + part.offset);
    if (status != Status::kOk) return status;
    end = part.end();
  }
  return Status::kOk;
}

Status read_conv_cuda_facts(int64_t length, const ConvShape& shape, CudaPackedFacts* facts) {
  return facts_of_length(length, parts_bytes(shape), fingerprint_of(shape), facts);
}

}  // namespace qk
