#include <cstring>
#include <vector>

#include "csrc/base/integers.h"
#include "csrc/conv/conv.h"
#include "csrc/conv/depthwise.h"
#include "csrc/conv/implicit_gemm.h"
#include "csrc/conv/winograd.h"

namespace qk {
namespace {

// A weight with one matrix's columns, as [column][tap][depth]. What a column does not read holds
// its zero point.
struct MatrixWeight {
  int64_t columns, taps, depth;
  int64_t idle;  // of a column: what it does not read
  std::vector<int8_t> values;
};

// The weights of one output channel at one tap, over the input channels of its group.
struct TapWeights {
  const int8_t* first;
  int64_t stride;
};

TapWeights tap_weights(const ConvSource& source, int64_t out_channel, int64_t tap) {
  const ConvShape& s = source.shape;
  const int64_t in_group = s.in_per_group(), out_group = s.out_per_group();
  const int64_t kernel_size = s.kernel_size();
  if (!s.transposed) {
    return {source.weight + out_channel * in_group * kernel_size + tap, kernel_size};
  }
  const int64_t row = out_channel / out_group * in_group * out_group + out_channel % out_group;
  return {source.weight + row * kernel_size + tap, out_group * kernel_size};
}

MatrixWeight matrix_weight(const ConvSource& source, const ConvPhase& phase, int64_t first_group,
                           int64_t groups, Isa isa) {
  const ConvShape& s = source.shape;
  const GemmPlan plan = gemm_plan(s, phase, groups, isa);
  const int64_t in_group = s.in_per_group(), out_group = s.out_per_group();
  const int64_t read = in_group * phase.dim[0].taps * phase.dim[1].taps * phase.dim[2].taps;
  const int64_t idle = plan.taps * plan.depth - read;
  MatrixWeight matrix{groups * out_group, plan.taps, plan.depth, idle, {}};
  matrix.values.resize(static_cast<size_t>(matrix.columns * plan.taps * plan.depth));
  int8_t* dst = matrix.values.data();
  for (int64_t column = 0; column < matrix.columns; ++column) {
    const int64_t out_channel = first_group * out_group + column;
    const int32_t zw = source.weight_zero_point == nullptr
                           ? 0
                           : source.weight_zero_point[source.per_tensor ? 0 : out_channel];
    std::memset(dst, zw, static_cast<size_t>(plan.taps * plan.depth));
    for (int64_t t0 = 0; t0 < phase.dim[0].taps; ++t0) {
      for (int64_t t1 = 0; t1 < phase.dim[1].taps; ++t1) {
        for (int64_t t2 = 0; t2 < phase.dim[2].taps; ++t2) {
          const int64_t k[kConvDims] = {phase.dim[0].kernel_first + t0 * phase.dim[0].kernel_step,
                                        phase.dim[1].kernel_first + t1 * phase.dim[1].kernel_step,
                                        phase.dim[2].kernel_first + t2 * phase.dim[2].kernel_step};
          const int64_t tap = (k[0] * s.kernel[1] + k[1]) * s.kernel[2] + k[2];
          // Runs: [t0][t1][t2 * C + c]; taps: [t0][t1][t2][group of the set * C/g + c].
          const int64_t row = t0 * phase.dim[1].taps + t1;
          int8_t* channels = dst + column / out_group * in_group +
                             (plan.runs ? row * plan.depth + t2 * in_group
                                        : (row * phase.dim[2].taps + t2) * plan.depth);
          const TapWeights weights = tap_weights(source, out_channel, tap);
          for (int64_t c = 0; c < in_group; ++c) channels[c] = weights.first[c * weights.stride];
        }
      }
    }
    dst += plan.taps * plan.depth;
  }
  return matrix;
}

PackSource matrix_source(const ConvSource& source, const MatrixWeight& weight,
                         int64_t first_column) {
  const int64_t skip = source.per_tensor ? 0 : first_column;
  PackSource pack = {};
  pack.weight = weight.values.data();
  pack.n = weight.columns;
  pack.taps = weight.taps;
  pack.depth = weight.depth;
  pack.stride_n = weight.taps * weight.depth;
  pack.stride_tap = weight.depth;
  pack.stride_k = 1;
  pack.weight_scale = source.weight_scale + skip;
  pack.weight_zero_point = source.weight_zero_point ? source.weight_zero_point + skip : nullptr;
  pack.per_tensor = source.per_tensor;
  pack.bias = source.bias ? source.bias + first_column : nullptr;
  pack.input_scale = source.input_scale;
  pack.input_zero_point = source.input_zero_point;
  pack.input_signed = source.input_signed;
  pack.output_scale = source.output_scale;
  pack.epilogue = source.epilogue;
  pack.idle = weight.idle;
  return pack;
}

// The matrix of the outputs that no tap reaches: one zero weight a column.
constexpr int64_t kFillDepth = 4;

MatrixWeight fill_weight(const ConvSource& source) {
  MatrixWeight matrix{source.shape.out_channels, 1, kFillDepth, kFillDepth, {}};
  matrix.values.resize(static_cast<size_t>(matrix.columns * kFillDepth), 0);
  for (int64_t i = 0; source.weight_zero_point != nullptr && i < matrix.columns * kFillDepth; ++i) {
    matrix.values[i] =
        static_cast<int8_t>(source.weight_zero_point[source.per_tensor ? 0 : i / kFillDepth]);
  }
  return matrix;
}

PackedConvHeader plan_header(const ConvSource& source, Isa isa) {
  PackedConvHeader h = {};
  h.magic = kPackedConvMagic;
  h.version = kPackedConvVersion;
  h.isa = isa;
  h.shape = source.shape;
  h.kind = is_depthwise(source) ? ConvKind::kDepthwise : ConvKind::kIgemm;
  h.input_zero_point = source.input_zero_point;
  h.input_signed = source.input_signed;
  h.epilogue = source.epilogue;
  h.has_fill = !phases_cover_output(source.shape);
  h.phases = conv_phase_count(source.shape);
  h.groups_per_set =
      h.kind == ConvKind::kDepthwise ? h.shape.groups : groups_per_set(source.shape, isa);
  h.sets = (h.shape.groups + h.groups_per_set - 1) / h.groups_per_set;
  h.parts = h.phases * h.sets + h.has_fill;
  h.parts_offset = sizeof(PackedConvHeader);
  return h;
}

// Lays out, and with a destination also writes, header and parts; bytes is the total.
Status layout(const ConvSource& original, Isa isa, bool has_transformed, uint8_t* dst,
              int64_t* bytes) {
  PackedConvHeader h = plan_header(original, isa);
  ConvSource source = original;
  if (h.kind == ConvKind::kDepthwise) source.shape = depthwise_shape(original.shape);
  const ConvShape& s = source.shape;
  int64_t at =
      align_up(h.parts_offset + h.parts * static_cast<int64_t>(sizeof(int64_t)), kPackedAlign);
  int64_t* offsets = dst ? reinterpret_cast<int64_t*>(dst + h.parts_offset) : nullptr;
  const auto place = [&](int64_t part, int64_t size) {
    if (offsets) offsets[part] = at;
    at += align_up(size, kPackedAlign);
  };
  for (int64_t p = 0; p < h.phases; ++p) {
    const ConvPhase phase = conv_phase(s, p);
    for (int64_t set = 0; set < h.sets; ++set) {
      uint8_t* part = dst ? dst + at : nullptr;
      Status status = Status::kOk;
      if (h.kind == ConvKind::kDepthwise) {
        place(p, packed_depthwise_bytes(source.shape, phase, isa));
        if (dst) status = pack_depthwise(source, phase, isa, part);
      } else {
        const int64_t groups = groups_in_set(s, h.groups_per_set, set);
        const GemmPlan plan = gemm_plan(s, phase, groups, isa);
        const int64_t first = set * h.groups_per_set;
        place(p * h.sets + set,
              packed_igemm_bytes(groups * s.out_per_group(), plan.taps, plan.depth, isa));
        if (dst) {
          const MatrixWeight weight = matrix_weight(source, phase, first, groups, isa);
          status = pack_igemm(matrix_source(source, weight, first * s.out_per_group()), isa, part);
        }
      }
      if (status != Status::kOk) return status;
    }
  }
  if (h.has_fill) {
    uint8_t* part = dst ? dst + at : nullptr;
    place(h.parts - 1, packed_igemm_bytes(s.out_channels, 1, kFillDepth, isa));
    if (dst) {
      const Status status = pack_igemm(matrix_source(source, fill_weight(source), 0), isa, part);
      if (status != Status::kOk) return status;
    }
  }
  if (has_transformed) {
    if (dst) pack_winograd(original, isa, reinterpret_cast<int16_t*>(dst + at));
    h.winograd_offset = at;
    at += align_up(packed_winograd_bytes(s, isa), kPackedAlign);
  }
  h.bytes = at;
  *bytes = at;
  if (dst) std::memcpy(dst, &h, sizeof(h));
  return Status::kOk;
}

// Whether the bytes of a part are what the shape in the header needs.
Status check_part(const PackedConvHeader& h, int64_t part, const uint8_t* bytes, int64_t size) {
  const bool is_fill = h.has_fill && part == h.parts - 1;
  if (h.kind == ConvKind::kDepthwise && !is_fill) {
    const ConvShape shape = depthwise_shape(h.shape);
    const int64_t needed = packed_depthwise_bytes(shape, conv_phase(shape, part), h.isa);
    return size >= needed ? Status::kOk : Status::kBadShape;
  }
  PackedMatrix matrix;
  const Status status = view_packed(bytes, size, &matrix);
  if (status != Status::kOk) return status;
  const PackedHeader& m = *matrix.header;
  if (m.epilogue.output != h.epilogue.output || m.epilogue.has_table != h.epilogue.has_table ||
      m.epilogue.has_residual != h.epilogue.has_residual || m.input_signed != h.input_signed) {
    return Status::kBadShape;
  }
  if (is_fill) {
    return m.n == h.shape.out_channels && m.taps == 1 && m.depth == kFillDepth ? Status::kOk
                                                                               : Status::kBadShape;
  }
  const int64_t groups = groups_in_set(h.shape, h.groups_per_set, part % h.sets);
  const GemmPlan plan = gemm_plan(h.shape, conv_phase(h.shape, part / h.sets), groups, h.isa);
  return m.n == groups * h.shape.out_per_group() && m.taps == plan.taps && m.depth == plan.depth
             ? Status::kOk
             : Status::kBadShape;
}

// Whether transformed weights, if any, fill the bytes behind the parts.
bool fits_winograd(const PackedConvHeader& h) {
  if (h.winograd_offset == 0) return true;
  return h.winograd_offset > 0 && h.winograd_offset % kPackedAlign == 0 &&
         winograd_shape(h.shape, h.isa) &&
         h.bytes - h.winograd_offset ==
             align_up(packed_winograd_bytes(h.shape, h.isa), kPackedAlign);
}

}  // namespace

int64_t packed_conv_bytes(const ConvSource& source, Isa isa) {
  int64_t bytes = 0;
  layout(source, isa, has_winograd(source, isa), nullptr, &bytes);
  return bytes;
}

Status pack_conv(const ConvSource& source, Isa isa, void* dst) {
  const bool has_transformed = has_winograd(source, isa);
  int64_t bytes = 0;
  layout(source, isa, has_transformed, nullptr, &bytes);
  // Gaps between parts are zero: equal arguments give equal bytes.
  std::memset(dst, 0, static_cast<size_t>(bytes));
  return layout(source, isa, has_transformed, static_cast<uint8_t*>(dst), &bytes);
}

Status view_packed_conv(const void* bytes, int64_t size, const PackedConvHeader** header) {
  const auto* h = static_cast<const PackedConvHeader*>(bytes);
  if (size < static_cast<int64_t>(sizeof(PackedConvHeader)) ||
      reinterpret_cast<uintptr_t>(bytes) % kPackedAlign != 0 || h->magic != kPackedConvMagic) {
    return Status::kBadMagic;
  }
  if (h->version != kPackedConvVersion) return Status::kBadVersion;
  if (h->isa != isa_active()) return Status::kBadIsa;
  if (h->bytes != size || check_conv_shape(h->shape) != Status::kOk || h->parts < 1 ||
      h->parts_offset != sizeof(PackedConvHeader) ||
      h->parts > (size - h->parts_offset) / static_cast<int64_t>(sizeof(int64_t)) ||
      h->phases != conv_phase_count(h->shape) || h->groups_per_set < 1 || h->sets < 1 ||
      h->sets != (h->shape.groups + h->groups_per_set - 1) / h->groups_per_set ||
      h->parts != h->phases * h->sets + h->has_fill || !fits_winograd(*h)) {
    return Status::kBadShape;
  }
  const auto* base = static_cast<const uint8_t*>(bytes);
  const auto* offsets = reinterpret_cast<const int64_t*>(base + h->parts_offset);
  for (int64_t part = 0; part < h->parts; ++part) {
    const int64_t end = part + 1 < h->parts ? offsets[part + 1] : h->parts_end();
    if (offsets[part] < 0 || offsets[part] >= end || offsets[part] % kPackedAlign != 0 ||
        end > size) {
      return Status::kBadShape;
    }
    const Status status = check_part(*h, part, base + offsets[part], end - offsets[part]);
    if (status != Status::kOk) return status;
  }
  *header = h;
  return Status::kOk;
}

}  // namespace qk
