// Which convolutions the depthwise kernels compute, and their weights.
#include <cmath>
#include <cstring>

#include "csrc/conv/depthwise_layout.h"

namespace qk {
namespace {

int64_t weights_bytes(const DepthwiseLayout& layout, const DepthwisePlan& plan, int64_t vectors) {
  return plan.columns * plan.row_groups * vectors * plan.rows_out * layout.vector_bytes(plan);
}

int64_t block_bytes(const DepthwiseLayout& layout, const DepthwisePlan& plan) {
  return parameter_bytes(layout, plan) + align_up(weights_bytes(layout, plan, layout.most_vectors));
}

// Value `r` of the dword `group` of output channel o, for horizontal tap kx and output row p: row
// `group` * rows in a dword + r of the window (0 where output row p does not read that row), or
// channel r of a quad.
int8_t dword_weight(const ConvSource& source, const ConvPhase& phase, const DepthwisePlan& plan,
                    int64_t o, int64_t group, int64_t r, int64_t p, int64_t kx) {
  const ConvShape& s = source.shape;
  const DimPhase* dim = phase.dim;
  const int64_t row = plan.quads ? group / plan.quads : group * (plan.rows / plan.row_groups) + r;
  const int64_t tap_rows = plan.rows / dim[0].taps, kd = row / tap_rows;
  const int64_t ky = plan.rows_out == 1 ? row % tap_rows : row % tap_rows - p * dim[1].in_stride;
  if (ky < 0 || ky >= dim[1].taps) return 0;
  const int64_t z = dim[0].kernel_first + kd * dim[0].kernel_step;
  const int64_t y = dim[1].kernel_first + ky * dim[1].kernel_step;
  const int64_t x = dim[2].kernel_first + kx * dim[2].kernel_step;
  const int64_t c = plan.quads ? group % plan.quads * 4 + r : 0;
  const int64_t out_group = s.out_per_group(), in_group = s.in_per_group();
  const int64_t filter =
      s.transposed ? (o / out_group * in_group + c) * out_group + o % out_group : o * in_group + c;
  return source.weight[filter * s.kernel_size() + (z * s.kernel[1] + y) * s.kernel[2] + x];
}

// One dword of weights in the place of `lane`.
void put_weights(const DepthwiseLayout& layout, const DepthwisePlan& plan, const int8_t w[4],
                 int64_t lane, int8_t* vector) {
  if (!layout.words) {
    std::memcpy(vector + 4 * lane, w, 4);
  } else if (plan.quads == 0) {
    const int16_t rows[2] = {w[0], w[1]};
    std::memcpy(vector + 4 * lane, rows, 4);
  } else {
    const int16_t even[2] = {w[0], w[2]}, odd[2] = {w[1], w[3]};
    std::memcpy(vector + 4 * lane, even, 4);
    std::memcpy(vector + layout.vector_bytes(plan) / 2 + 4 * lane, odd, 4);
  }
}

}  // namespace

DepthwisePlan depthwise_plan(const ConvShape& shape, const ConvPhase& phase,
                             const DepthwiseLayout& layout) {
  const DimPhase& h = phase.dim[1];
  DepthwisePlan plan;
  plan.columns = phase.dim[2].taps;
  if (shape.in_per_group() > 1) {
    plan.quads = shape.in_per_group() / 4;
    plan.rows_out = 1;
    plan.window = h.taps;
    plan.rows = phase.dim[0].taps * plan.window;
    plan.row_groups = plan.rows * plan.quads;
    return plan;
  }
  const int64_t pair = h.taps + h.in_stride;
  const int64_t dword_rows = layout.dword_rows();
  const bool share = (h.in_dilation == 1 || h.taps == 1) &&
                     ceil_div(pair, dword_rows) == ceil_div(h.taps, dword_rows);
  plan.quads = 0;
  plan.rows_out = share ? 2 : 1;
  plan.window = share ? pair : h.taps;
  plan.row_groups = phase.dim[0].taps * ceil_div(plan.window, dword_rows);
  plan.rows = plan.row_groups * dword_rows;
  return plan;
}

bool is_depthwise(const ConvSource& source) {
  const ConvShape& s = source.shape;
  const int64_t in = s.in_per_group(), out = s.out_per_group();
  const bool narrow = in % 4 == 0 && in <= out && (out == 4 || out == 8 || out == 16);
  if (s.groups == 1 || !(in == 1 || narrow) || in * s.kernel_size() > kMaxKU8S8) return false;
  for (int64_t c = 0; source.weight_zero_point && c < (source.per_tensor ? 1 : s.out_channels);
       ++c) {
    if (source.weight_zero_point[c] != 0) return false;
  }
  return true;
}

int64_t packed_depthwise_bytes(const ConvShape& shape, const ConvPhase& phase, Isa isa) {
  const DepthwiseLayout layout = layout_of(isa);
  const int64_t blocks = ceil_div(shape.out_channels, layout.block_channels());
  return static_cast<int64_t>(sizeof(DepthwisePart)) +
         blocks * block_bytes(layout, depthwise_plan(shape, phase, layout));
}

Status pack_depthwise(const ConvSource& source, const ConvPhase& phase, Isa isa, uint8_t* dst) {
  const DepthwiseLayout layout = layout_of(isa);
  const DepthwisePlan plan = depthwise_plan(source.shape, phase, layout);
  const int64_t channels = source.shape.out_channels;
  auto* part = reinterpret_cast<DepthwisePart*>(dst);
  std::memset(dst, 0, static_cast<size_t>(packed_depthwise_bytes(source.shape, phase, isa)));
  part->epilogue = source.epilogue;
  part->block_bytes = block_bytes(layout, plan);
  part->raw = !source.epilogue.is_8bit();
  uint8_t* block = dst + sizeof(DepthwisePart);
  for (int64_t first = 0; first < channels; first += layout.block_channels()) {
    const int64_t vectors = layout.vectors(channels - first), positions = vectors * layout.lanes;
    auto* init = reinterpret_cast<int32_t*>(block);
    auto* addend = reinterpret_cast<float*>(init + positions);
    auto* mult = addend + positions;
    auto* order = reinterpret_cast<int32_t*>(mult + positions);
    auto* weights = reinterpret_cast<int8_t*>(block) + parameter_bytes(layout, plan);
    for (int64_t position = 0; position < positions; ++position) {
      const int64_t o = first + channel_at(layout.chunks(vectors), position);
      if (o >= channels) continue;
      const int64_t vector = position / layout.lanes, lane = position % layout.lanes;
      for (int64_t quad = 0; quad < plan.quads; ++quad) {
        order[quad * positions + position] =
            static_cast<int32_t>((o - first) / source.shape.out_per_group() * plan.quads + quad);
      }
      int32_t sum = 0, magnitude = 0;
      for (int64_t kx = 0; kx < plan.columns; ++kx) {
        for (int64_t group = 0; group < plan.row_groups; ++group) {
          for (int64_t p = 0; p < plan.rows_out; ++p) {
            int8_t w[4] = {};
            const int64_t values = plan.quads ? 4 : layout.dword_rows();
            for (int64_t r = 0; r < values; ++r) {
              w[r] = dword_weight(source, phase, plan, o, group, r, p, kx);
              if (p == 0) {
                sum += w[r];
                magnitude += w[r] < 0 ? -w[r] : w[r];
              }
            }
            put_weights(
                layout, plan, w, lane,
                weights +
                    (((kx * plan.row_groups + group) * vectors + vector) * plan.rows_out + p) *
                        layout.vector_bytes(plan));
          }
        }
      }
      const int32_t za = source.input_zero_point + (source.input_signed ? 128 : 0);
      const float product = source.input_scale * source.weight_scale[source.per_tensor ? 0 : o];
      const FoldedColumn column =
          folded(sum, 0, za, 0, product, source.bias ? source.bias + o : nullptr,
                 source.epilogue.is_8bit(), source.output_scale);
      if (!in_range(product, column)) return Status::kBadScale;
      init[position] = column.init;
      addend[position] = column.addend;
      mult[position] = column.mult;
      const double most = (255.0 * magnitude + std::fabs(addend[position])) * mult[position];
      if (!(most < 2147480000.0)) part->raw = 1;
    }
    block += part->block_bytes;
  }
  return Status::kOk;
}

}  // namespace qk
