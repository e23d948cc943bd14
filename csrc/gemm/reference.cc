// Normative: the formula of igemm.h, one output at a time, from the packed layout.
#include "csrc/gemm/igemm.h"

namespace qk {
namespace {

const uint8_t* row_of(const IgemmArgs& args, int64_t row, int64_t tap) {
  return args.pointers != nullptr ? args.pointers[row * args.matrix.header->taps + tap]
                                  : args.a + row * args.a_row_stride;
}

// sum over tap, k of byte(a) * (w - zw), modulo 2^32, on top of init[n].
int32_t accumulate(const IgemmArgs& args, int64_t row, int64_t n) {
  const PackedMatrix& m = args.matrix;
  const PackedHeader& h = *m.header;
  const PanelShape shape = panel_shape(h.isa);
  const int64_t panel = n / shape.columns, column = n % shape.columns, quads = (h.depth + 3) / 4;
  const int64_t rest = h.n - panel * shape.columns;
  const int64_t width =
      rest >= shape.columns ? shape.columns : (rest + shape.lanes - 1) / shape.lanes * shape.lanes;
  const int8_t* b = m.panels + panel * h.panel_bytes;
  const uint8_t flip = h.input_signed ? 0x80 : 0;
  uint32_t acc = static_cast<uint32_t>(m.init[n]), row_sum = 0;
  for (int64_t tap = 0; tap < h.taps; ++tap) {
    const uint8_t* a = row_of(args, row, tap);
    const int8_t* w = b + (tap * quads * width + column) * 4;
    for (int64_t k = 0; k < h.depth; k += 4, w += width * 4) {
      const int64_t end = h.depth - k < 4 ? h.depth - k : 4;
      for (int64_t i = 0; i < end; ++i) {
        const int32_t value = a[k + i] ^ flip;
        acc += static_cast<uint32_t>(value * w[i]);
        row_sum += static_cast<uint32_t>(value);
      }
    }
  }
  if (m.weight_zero_point != nullptr) {
    acc -= row_sum * static_cast<uint32_t>(m.weight_zero_point[n]);
  }
  return static_cast<int32_t>(acc);
}

int64_t offset_of(const int64_t* offsets, int64_t stride, int64_t row) {
  return offsets != nullptr ? offsets[row] : row * stride;
}

}  // namespace

void igemm_scalar(const IgemmBlock& block) {
  const IgemmArgs& args = block.args;
  const PackedMatrix& m = args.matrix;
  const Epilogue& e = m.header->epilogue;
  const int64_t columns = panel_shape(m.header->isa).columns, bytes = output_bytes(e.output);
  const int64_t first = block.panel_begin * columns;
  const int64_t last =
      block.panel_end * columns < m.header->n ? block.panel_end * columns : m.header->n;
  for (int64_t row = block.row_begin; row < block.row_end; ++row) {
    uint8_t* out =
        static_cast<uint8_t*>(args.out) + offset_of(args.out_row_offset, args.out_row_stride, row);
    const uint8_t* residual =
        e.has_residual
            ? args.residual + offset_of(args.residual_row_offset, args.residual_row_stride, row)
            : nullptr;
    for (int64_t n = first; n < last; ++n) {
      store_output(e, accumulate(args, row, n), m.addend[n], m.mult[n], out + n * bytes,
                   residual == nullptr ? nullptr : residual + n, args.residual_signed);
    }
  }
}

}  // namespace qk
