#include "csrc/gemm/dequantized.h"

namespace qk {

void igemm_dequantized(const IgemmArgs& args, const DequantizedOutput& floats, uint8_t* codes) {
  const PackedHeader& header = *args.matrix.header;
  const int64_t columns = panel_shape(header.isa).columns, first = args.panel_begin * columns;
  const int64_t last = args.panel_end * columns < header.n ? args.panel_end * columns : header.n;
  const int64_t width = last - first;
  // Rows and columns are counted from the start of the matrix, in codes from those of this call.
  const int64_t before = args.row_begin * width + first;
  IgemmArgs quantized = args;
  quantized.out = reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(codes) -
                                             static_cast<uintptr_t>(before));
  quantized.out_row_stride = width;
  quantized.out_row_offset = nullptr;
  igemm(quantized);

  const DequantizeKernel dequantize = select_dequantize_kernel(FloatType::kFloat32);
  const int64_t in_rows = args.row_end - args.row_begin;
  const int64_t rows = args.run_pitch == 0 ? in_rows : in_rows / args.run_pitch * args.run_width;
  auto* out = static_cast<uint8_t*>(args.out) + first * 4;
  const bool dense = args.out_row_offset == nullptr && args.out_row_stride == width * 4;
  const int64_t step = dense ? rows : 1;
  for (int64_t i = 0; i < rows; i += step) {
    const int64_t row = args.row_begin + i;
    dequantize({.q = codes + i * width,
                .x = out + (args.out_row_offset != nullptr ? args.out_row_offset[row]
                                                           : row * args.out_row_stride),
                .n = step * width,
                .grid = {floats.scale, nullptr, floats.zero_point, false},
                .q_type = header.epilogue.is_signed() ? CodeType::kInt8 : CodeType::kUInt8,
                .stream = floats.stream});
  }
  if (floats.stream) stream_fence();
}

}  // namespace qk
