#include "csrc/linear_rows/linear_rows.h"

#include "csrc/base/integers.h"

namespace qk {
namespace {

// A block of sums is at most so large: it stays in L2, and on the stack.
constexpr int64_t kBlockRows = 96, kBlockColumns = 256;

struct BlockRange {
  int64_t first_row, rows, first_panel, end_panel;
};

// The sums of a block, then its outputs. `sums`: kBlockRows * kBlockColumns elements.
void run_block(const LinearRowsArgs& args, const BlockRange& block, ScaleKernel scale,
               int32_t* sums) {
  const PackedHeader& header = *args.matrix.header;
  const int64_t panel_columns = panel_shape(header.isa).columns;
  const int64_t first = block.first_panel * panel_columns;
  const int64_t end =
      block.end_panel * panel_columns < header.n ? block.end_panel * panel_columns : header.n;
  IgemmArgs product;
  product.matrix = args.matrix;
  product.a = args.input + block.first_row * args.input_row_stride;
  product.a_row_stride = args.input_row_stride;
  product.row_end = block.rows;
  product.panel_begin = block.first_panel;
  product.panel_end = block.end_panel;
  // Where column 0 would be.
  product.out = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(sums) -
                                        static_cast<uintptr_t>(first) * sizeof(int32_t));
  product.out_row_stride = kBlockColumns * static_cast<int64_t>(sizeof(int32_t));
  igemm(product);
  const int64_t bytes = output_bytes(args.output);
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = block.first_row + i;
    scale({.acc = sums + i * kBlockColumns,
           .n = end - first,
           .zero_point = args.scales.row_zero_point[row],
           .scale = args.scales.row_scale[row],
           .weight_scale = args.scales.weight_scale + first,
           .weight_sum = args.scales.weight_sum + first,
           .bias = args.scales.bias == nullptr ? nullptr : args.scales.bias + first,
           .output = args.output,
           .out = static_cast<char*>(args.out) + (row * header.n + first) * bytes});
  }
}

}  // namespace

ScaleKernel select_scale_kernel(CpuFeatures features) {
#define QK_SCALE_KERNEL(need, name) \
  if (has_features(features, need)) return name;
#include "csrc/linear_rows/kernels.inc"
#undef QK_SCALE_KERNEL
  return nullptr;
}

void linear_rows(const LinearRowsArgs& args, const Parallel& parallel) {
  const PackedHeader& header = *args.matrix.header;
  if (args.rows == 0 || header.n == 0) return;
  const ScaleKernel scale = select_scale_kernel();
  const int64_t panels = panel_count(header.n, header.isa);
  const int64_t row_blocks = ceil_div(args.rows, kBlockRows);
  // Fewer columns at a time where threads would be left without a block.
  const int64_t most_panels = kBlockColumns / panel_shape(header.isa).columns;
  const int64_t wanted = ceil_div(panels * row_blocks, 2 * parallel.threads);
  const int64_t step = wanted < 1 ? 1 : wanted < most_panels ? wanted : most_panels;
  const int64_t blocks = ceil_div(panels, step) * row_blocks;
  parallel.for_each_range(
      blocks, linear_work_ns(header, args.rows), [&](int64_t begin, int64_t end) {
        alignas(64) int32_t sums[kBlockRows * kBlockColumns];
        for (int64_t index = begin; index < end; ++index) {
          // Blocks of the same weights follow one another.
          const int64_t first_row = index % row_blocks * kBlockRows;
          const int64_t left = args.rows - first_row;
          const int64_t first_panel = index / row_blocks * step;
          run_block(args,
                    {.first_row = first_row,
                     .rows = left < kBlockRows ? left : kBlockRows,
                     .first_panel = first_panel,
                     .end_panel = first_panel + step < panels ? first_panel + step : panels},
                    scale, sums);
        }
      });
}

}  // namespace qk
