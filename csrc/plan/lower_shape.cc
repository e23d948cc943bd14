// Steps that move and cut.
#include "csrc/plan/builder.h"

namespace qk::plan {
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

void Builder::lower_reshape(const Step& step, View* out) {
  const View& x = input(step, 0);
  View to = output_view(step), seen;
  if (reshape_view(x, to.size, out)) return;
  // Channels that were mixed stay innermost if their pixels stay together.
  set_channels_last(&to);
  if (!wants_channels_last_[step.output] || !reshape_view(to, x.size, &seen)) {
    reshape_view(as_contiguous(x), to.size, out);
    return;
  }
  allocate(&to);
  seen.buffer = to.buffer;
  emit_move(x, seen, nullptr, "copy");
  *out = to;
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
