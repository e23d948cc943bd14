// Steps that move, cut and join.
#include "csrc/plan/builder.h"

namespace qk::plan {
namespace {

bool is_identity(const uint8_t* table) {
  for (int i = 0; i < 256; ++i) {
    if (table[i] != i) return false;
  }
  return true;
}

}  // namespace

// A convolution whose result goes nowhere but into a concatenation of channels, as it is, writes it
// there.
void Builder::find_parts_of_cats() {
  cat_of_.assign(model_.values.size(), -1);
  for (size_t i = 0; i < model_.steps.size(); ++i) {
    const Step& cat = model_.steps[i];
    if (cat.kind != StepKind::kCat || cat.as<CatStep>().dim != 1) continue;
    for (size_t k = 0; k < cat.inputs.size(); ++k) {
      const int value = cat.inputs[k];
      if (writer_[value] < 0 || readers_[value] > 1 ||
          model_.steps[writer_[value]].kind != StepKind::kConv ||
          model_.values[value].dtype != model_.values[cat.output].dtype ||
          !is_identity(constants_[cat.as<CatStep>().tables] + 256 * k)) {
        continue;
      }
      if (conv_writes_slices(*packed_conv(writer_[value]))) cat_of_[value] = static_cast<int>(i);
    }
  }
}

View Builder::part_of_cat(int value) {
  const Step& cat = model_.steps[cat_of_[value]];
  View& whole = views_[cat.output];
  if (whole.buffer < 0) {
    whole = output_view(cat);
    set_channels_last(&whole);
    allocate(&whole);
  }
  int64_t first = 0;
  for (const int before : cat.inputs) {
    if (before == value) break;
    first += shapes_.values[before][1];
  }
  return narrow(whole, 1, first, shapes_.values[value][1]);
}

void Builder::lower_cat(const Step& step, View* out) {
  const auto& s = step.as<CatStep>();
  if (out->buffer < 0) {
    bool channels_last = out->rank() >= 3;
    for (size_t i = 0; i < step.inputs.size(); ++i) {
      const View& x = input(step, static_cast<int>(i));
      channels_last = channels_last && (x.size.elements() == 0 || is_channels_last(x));
    }
    channels_last ? set_channels_last(out) : set_contiguous(out);
    allocate(out);
  }
  int64_t first = 0;
  for (size_t i = 0; i < step.inputs.size(); ++i) {
    const View& x = input(step, static_cast<int>(i));
    const uint8_t* table = constants_[s.tables] + 256 * i;
    if (cat_of_[step.inputs[i]] < 0) {
      emit_move(x, narrow(*out, s.dim, first, x.size[s.dim]), is_identity(table) ? nullptr : table,
                "cat");
    }
    first += x.size[s.dim];
  }
}

void Builder::lower_pad(const Step& step, View* out) {
  const auto& s = step.as<PadStep>();
  View from = input(step, 0), to = *out;
  is_channels_last(from) ? set_channels_last(&to) : set_contiguous(&to);
  allocate(&to);
  *out = to;
  if (out->size.elements() == 0) return;
  FillOp fill;
  fill.value = static_cast<int>(s.value);
  fill.bytes = bytes_of(*out);
  fill.out = ref(*out);
  emit(fill, "pad", "fill", {}, *out);
  for (int i = 0; i < s.pairs; ++i) {
    const int d = from.rank() - 1 - i;
    const int64_t before = shapes_.scalars[s.amounts[2 * i]];
    const int64_t after = shapes_.scalars[s.amounts[2 * i + 1]];
    const int64_t cropped = before < 0 ? -before : 0;
    const int64_t count = from.size[d] - cropped - (after < 0 ? -after : 0);
    from = narrow(from, d, cropped, count);
    to = narrow(to, d, before > 0 ? before : 0, count);
  }
  emit_move(from, to, nullptr, "pad");
}

void Builder::lower_permute(const Step& step, View* out) {
  const View& x = input(step, 0);
  const auto& s = step.as<ShapeStep>();
  out->buffer = x.buffer;
  out->offset = x.offset;
  for (int d = 0; d < s.rank; ++d) out->stride[d] = x.stride[s.items[d]];
}

void Builder::lower_slice(const Step& step, View* out) {
  const View& x = input(step, 0);
  const auto& s = step.as<SliceStep>();
  const Slice slice =
      slice_of(shapes_.scalars[s.start], shapes_.scalars[s.stop], s.step, x.size[s.dim]);
  *out = narrow(x, s.dim, slice.count > 0 ? slice.first : 0, slice.count, s.step);
}

void Builder::lower_expand(const Step& step, View* out) {
  *out = broadcast(input(step, 0), out->size);
}

}  // namespace qk::plan
