// Packing: from a canonical int8 weight and its grids to the bytes that the kernels read.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "csrc/gemm/byte_steps.h"
#include "csrc/gemm/igemm.h"

namespace qk {
namespace {

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Layout {
  int64_t quads, columns, panels, panel_bytes;
  int64_t panels_offset, init_offset, zero_point_offset, addend_offset, mult_offset;
  int64_t bytes;
};

Layout layout_of(int64_t n, int64_t taps, int64_t depth, Isa isa) {
  const PanelShape shape = panel_shape(isa);
  Layout layout{};
  layout.quads = (depth + 3) / 4;
  layout.columns = round_up(n, shape.lanes);
  layout.panels = panel_count(n, isa);
  const int64_t column_bytes =
      isa == Isa::kAvx2 ? 4 + round_up(taps * depth, 4) : taps * layout.quads * 4;
  layout.panel_bytes = column_bytes * shape.columns;
  int64_t offset = sizeof(PackedHeader);
  const auto reserve = [&offset](int64_t bytes) {
    const int64_t at = offset;
    offset = round_up(offset + bytes, kPackedAlign);
    return at;
  };
  layout.init_offset = reserve(layout.columns * 4);
  layout.zero_point_offset = reserve(layout.columns * 4);
  layout.addend_offset = reserve(layout.columns * 4);
  layout.mult_offset = reserve(layout.columns * 4);
  const int64_t steps = isa == Isa::kAvx2 ? byte_steps_bytes(layout.columns, taps * depth) : 0;
  layout.panels_offset = reserve(std::max(steps, column_bytes * layout.columns));
  if (isa == Isa::kAmx) reserve(kAmxTailBytes);
  layout.bytes = offset;
  return layout;
}

// Four weights of one column, of ascending k.
struct Quad {
  int8_t w[4];
};

// Whether no sum of an 8-bit output and a residual leaves the int32 range before it is clamped.
bool narrow_residual(const ResidualAdd& add) {
  const double most = std::fabs(double{add.offset}) + 255 * std::fabs(double{add.scale}) +
                      std::fabs(double{add.residual_offset}) +
                      255 * std::fabs(double{add.residual_scale});
  return most * add.inv_scale < 2147480000.0;
}

struct PanelWriter {
  const PackSource& source;
  int64_t first_column, columns, width;
  bool overlaps;  // overlaps_tail()

  // k < depth; beyond it the weights are 0.
  Quad quad(int64_t column, int64_t tap, int64_t k) const {
    const int8_t* row =
        source.weight + (first_column + column) * source.stride_n + tap * source.stride_tap;
    Quad quad{};
    if (source.stride_k == 1 && k + 4 <= source.depth) {
      std::memcpy(&quad, row + k, 4);
    } else {
      const int64_t left = source.depth - k < 4 ? source.depth - k : 4;
      for (int64_t i = 0; i < left; ++i) quad.w[i] = row[(k + i) * source.stride_k];
    }
    return quad;
  }
  // What meets the activations of quad `index`, the last of a depth that is no multiple of 4.
  Quad tail(int64_t column, int64_t tap, int64_t index) const {
    const Quad q = quad(column, tap, index * 4);
    if (!overlaps) return q;
    const int64_t before = 4 - source.depth % 4;
    Quad moved{};
    for (int64_t i = before; i < 4; ++i) moved.w[i] = q.w[i - before];
    return moved;
  }
};

// A line of a row at a time, so that the rows' distance does not matter to the cache.
void write_panel(const PanelWriter& panel, int64_t taps, int64_t quads, int8_t* dst) {
  constexpr int64_t kLineQuads = 16;
  const PackSource& source = panel.source;
  const int64_t quad_bytes = panel.width * 4, full = source.depth / 4;
  for (int64_t tap = 0; tap < taps; ++tap, dst += quads * quad_bytes) {
    for (int64_t first = 0; first < quads; first += kLineQuads) {
      const int64_t end = quads - first < kLineQuads ? quads : first + kLineQuads;
      const int64_t whole = source.stride_k != 1 ? first : end < full ? end : full;
      for (int64_t c = 0; c < panel.columns; ++c) {
        const int8_t* row =
            source.weight + (panel.first_column + c) * source.stride_n + tap * source.stride_tap;
        int8_t* out = dst + c * 4;
        int64_t index = first;
        for (; index < whole; ++index) std::memcpy(out + index * quad_bytes, row + index * 4, 4);
        for (; index < end; ++index) {
          const Quad q = index < full ? panel.quad(c, tap, index * 4) : panel.tail(c, tap, index);
          std::memcpy(out + index * quad_bytes, &q, 4);
        }
      }
    }
  }
}

int64_t sum_of(const int8_t* w, int64_t count) {
  constexpr int64_t kRun = 1 << 16;  // an int32 holds its sum
  int64_t sum = 0;
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t end = count - first < kRun ? count : first + kRun;
    int32_t part = 0;
    for (int64_t i = first; i < end; ++i) part += w[i];
    sum += part;
  }
  return sum;
}

// The sum of all weights of output channel n.
int64_t channel_sum(const PackSource& source, int64_t n) {
  const int64_t taps = source.taps, depth = source.depth;
  const int8_t* first = source.weight + n * source.stride_n;
  const bool depth_inside = source.stride_k == 1 && (taps == 1 || source.stride_tap == depth);
  const bool taps_inside = source.stride_tap == 1 && source.stride_k == taps;
  if (depth_inside || taps_inside) return sum_of(first, taps * depth);
  int64_t sum = 0;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int8_t* row = first + tap * source.stride_tap;
    for (int64_t k = 0; k < depth; ++k) sum += row[k * source.stride_k];
  }
  return sum;
}

// The AVX2 layout without steps: the int32 at which the sums of a column start, then pairs of
// values, one tap after the other. A line of a row at a time, as above.
void write_pairs(const PanelWriter& panel, int64_t taps, int64_t depth, const int32_t* init,
                 int8_t* dst) {
  constexpr int64_t kLine = 64;
  const PackSource& source = panel.source;
  int8_t* pairs = dst + 4 * panel.width;
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t first = 0; first < depth; first += kLine) {
      const int64_t end = depth - first < kLine ? depth : first + kLine;
      for (int64_t c = 0; c < panel.columns; ++c) {
        const int8_t* row =
            source.weight + (panel.first_column + c) * source.stride_n + tap * source.stride_tap;
        for (int64_t k = first; k < end; ++k) {
          const int64_t at = tap * depth + k;
          pairs[(at / 2 * panel.width + c) * 2 + at % 2] = row[k * source.stride_k];
        }
      }
    }
  }
  auto* start = reinterpret_cast<int32_t*>(dst);
  std::memcpy(start, init + panel.first_column, static_cast<size_t>(4 * panel.columns));
  for (int64_t k = 0; k < taps * depth; k += 4, pairs += 4 * panel.width) {
    for (int64_t c = 0; c < panel.columns; ++c) {
      const int8_t *low = pairs + 2 * c, *high = low + 2 * panel.width;
      const int32_t crosses = low[0] * high[0] + low[1] * high[1];
      start[c] =
          static_cast<int32_t>(static_cast<uint32_t>(start[c]) - static_cast<uint32_t>(crosses));
    }
  }
}

}  // namespace

int64_t packed_igemm_bytes(int64_t n, int64_t taps, int64_t depth, Isa isa) {
  return layout_of(n, taps, depth, isa).bytes;
}

Status check_accumulator(const PackSource& source) {
  const int64_t k = source.products();
  if (k > (source.input_signed ? kMaxKS8S8 : kMaxKU8S8)) return Status::kKTooLarge;
  const int64_t low = source.input_signed ? -128 : 0;
  const int64_t za = source.input_zero_point;
  const int64_t a = za - low > low + 255 - za ? za - low : low + 255 - za;
  int64_t w = 128;
  if (source.weight_zero_point != nullptr) {
    for (int64_t i = 0; i < (source.per_tensor ? 1 : source.n); ++i) {
      const int64_t zw = source.weight_zero_point[i];
      const int64_t reach = zw + 128 > 127 - zw ? zw + 128 : 127 - zw;
      if (zw != 0 && reach > w) w = reach;
    }
  }
  return k * a * w <= INT32_MAX ? Status::kOk : Status::kKTooLarge;
}

Status fold_column(const PackSource& source, int64_t n, int64_t za, const ColumnTerms& terms) {
  const int64_t sum = channel_sum(source, n);
  const int64_t grid = source.per_tensor ? 0 : n;
  const int64_t zw = source.weight_zero_point == nullptr ? 0 : source.weight_zero_point[grid];
  const float scale = source.input_scale * source.weight_scale[grid];
  const FoldedColumn column = folded(sum, source.taps * source.depth, za, zw, scale,
                                     source.bias == nullptr ? nullptr : source.bias + n,
                                     source.epilogue.is_8bit(), source.output_scale);
  terms.init[n] = column.init;
  terms.weight_zero_point[n] = static_cast<int32_t>(zw);
  terms.addend[n] = column.addend;
  terms.mult[n] = column.mult;
  return in_range(scale, column) ? Status::kOk : Status::kBadScale;
}

Status pack_igemm(const PackSource& source, Isa isa, void* dst) {
  if (const Status status = check_accumulator(source); status != Status::kOk) return status;
  const PanelShape shape = panel_shape(isa);
  const Layout layout = layout_of(source.n, source.taps, source.depth, isa);
  auto* bytes = static_cast<uint8_t*>(dst);
  std::memset(bytes, 0, layout.bytes);
  auto* init = reinterpret_cast<int32_t*>(bytes + layout.init_offset);
  auto* zero_point = reinterpret_cast<int32_t*>(bytes + layout.zero_point_offset);
  auto* addend = reinterpret_cast<float*>(bytes + layout.addend_offset);
  auto* mult = reinterpret_cast<float*>(bytes + layout.mult_offset);
  auto* panels = reinterpret_cast<int8_t*>(bytes + layout.panels_offset);

  PackedHeader header{};
  header.magic = kPackedMagic;
  header.version = kPackedVersion;
  header.isa = isa;
  header.bytes = layout.bytes;
  header.n = source.n;
  header.taps = source.taps;
  header.depth = source.depth;
  header.panel_bytes = layout.panel_bytes;
  header.panels_offset = layout.panels_offset;
  header.init_offset = layout.init_offset;
  header.zero_point_offset = layout.zero_point_offset;
  header.addend_offset = layout.addend_offset;
  header.mult_offset = layout.mult_offset;
  header.input_signed = source.input_signed;
  header.epilogue = source.epilogue;

  if (source.epilogue.has_residual && !narrow_residual(source.epilogue.residual)) header.wide = 1;

  const int64_t za = source.input_zero_point + (source.input_signed ? 128 : 0);
  const ColumnTerms terms{init, zero_point, addend, mult};
  for (int64_t n = 0; n < source.n; ++n) {
    if (const Status status = fold_column(source, n, za, terms); status != Status::kOk) {
      return status;
    }
    if (zero_point[n] != 0) header.has_weight_zero_point = 1;
    if ((0x1p31f + std::fabs(addend[n])) * mult[n] >= 0x1p31f) header.wide = 1;
  }
  if (isa == Isa::kAvx2) header.orders = pack_byte_steps(source, layout.columns, panels);
  for (int64_t panel = 0; header.orders == 0 && panel < layout.panels; ++panel) {
    const int64_t first = panel * shape.columns;
    const int64_t columns = source.n - first < shape.columns ? source.n - first : shape.columns;
    const PanelWriter writer{source, first, columns, round_up(columns, shape.lanes),
                             overlaps_tail(isa, source.depth)};
    int8_t* at = panels + panel * layout.panel_bytes;
    if (isa == Isa::kAvx2) {
      write_pairs(writer, source.taps, source.depth, init, at);
    } else {
      write_panel(writer, source.taps, layout.quads, at);
    }
  }
  std::memcpy(bytes, &header, sizeof(header));
  return Status::kOk;
}

Status view_packed(const void* bytes, int64_t size, PackedMatrix* matrix) {
  if (size < static_cast<int64_t>(sizeof(PackedHeader)) ||
      reinterpret_cast<uintptr_t>(bytes) % kPackedAlign != 0) {
    return Status::kBadMagic;
  }
  const auto* header = static_cast<const PackedHeader*>(bytes);
  if (header->magic != kPackedMagic) return Status::kBadMagic;
  if (header->version != kPackedVersion) return Status::kBadVersion;
  if (header->isa != isa_active()) return Status::kBadIsa;
  constexpr int64_t kLimit = int64_t{1} << 40;
  if (header->n < 0 || header->taps < 0 || header->depth < 0 || header->n > kLimit ||
      header->taps > kMaxColumn || header->depth > kMaxColumn ||
      header->taps * header->depth > kMaxColumn) {
    return Status::kBadShape;
  }
  const Layout layout = layout_of(header->n, header->taps, header->depth, header->isa);
  if (header->bytes != layout.bytes || size < layout.bytes ||
      header->panel_bytes != layout.panel_bytes || header->init_offset != layout.init_offset ||
      header->zero_point_offset != layout.zero_point_offset ||
      header->addend_offset != layout.addend_offset || header->mult_offset != layout.mult_offset ||
      header->panels_offset != layout.panels_offset) {
    return Status::kBadShape;
  }
  const bool ordered = header->orders == 1 || header->orders == kMostOrders;
  if (header->orders != 0 && (header->isa != Isa::kAvx2 || !ordered)) return Status::kBadShape;
  const auto* base = static_cast<const uint8_t*>(bytes);
  matrix->header = header;
  matrix->panels = reinterpret_cast<const int8_t*>(base + layout.panels_offset);
  matrix->init = reinterpret_cast<const int32_t*>(base + layout.init_offset);
  matrix->weight_zero_point =
      header->has_weight_zero_point
          ? reinterpret_cast<const int32_t*>(base + layout.zero_point_offset)
          : nullptr;
  matrix->addend = reinterpret_cast<const float*>(base + layout.addend_offset);
  matrix->mult = reinterpret_cast<const float*>(base + layout.mult_offset);
  return Status::kOk;
}

}  // namespace qk
