#include "csrc/gemm/linear.h"

#include "csrc/base/integers.h"

namespace qk {
namespace {

// Rows are shared out in groups of so many, so that parts consist of full tiles.
constexpr int64_t row_group(Isa isa) { return isa == Isa::kAvx2 ? 16 : 6; }
// Rows whose codes are dequantized at a time.
constexpr int64_t kCodeRows = 256;
// About what one core gets of weights from L3 in a nanosecond.
constexpr int64_t kBytesPerNs = 48;

struct Grid {
  int64_t rows, panels;  // parts in each direction
};

// The grid of at most `threads` parts whose largest part is smallest; of equal ones that with the
// most parts along the larger operand.
Grid choose_grid(int64_t row_groups, int64_t panels, int64_t threads, bool weights_are_larger) {
  Grid best{1, 1};
  int64_t best_size = row_groups * panels;
  for (int64_t i = 1; i <= threads; ++i) {
    const int64_t rows = weights_are_larger ? i : threads / i;
    const int64_t columns = weights_are_larger ? threads / i : i;
    if (rows > row_groups || columns > panels || rows < 1 || columns < 1) continue;
    const int64_t size = ceil_div(row_groups, rows) * ceil_div(panels, columns);
    if (size < best_size) {
      best_size = size;
      best = {rows, columns};
    }
  }
  return best;
}

// Block by block where the codes are dequantized, so that they stay in the cache.
void run_part(const LinearArgs& args, const IgemmArgs& part, uint8_t* codes) {
  if (args.floats.scale == nullptr) return igemm(part);
  IgemmArgs block = part;
  for (int64_t row = part.row_begin; row < part.row_end; row = block.row_end) {
    block.row_begin = row;
    block.row_end = part.row_end - row < kCodeRows ? part.row_end : row + kCodeRows;
    block.next = block.row_end == part.row_end ? part.next : NextWeights{};
    igemm_dequantized(block, args.floats, codes);
  }
}

// Of the codes of a part.
int64_t codes_bytes(const LinearArgs& args) {
  const int64_t rows = args.rows < kCodeRows ? args.rows : kCodeRows;
  return args.floats.scale == nullptr ? 0 : rows * args.matrix.header->n;
}

}  // namespace

int64_t linear_workspace_bytes(const LinearArgs& args, const Parallel& parallel) {
  return parallel.threads * codes_bytes(args);
}

int64_t linear_work_ns(const PackedHeader& header, int64_t rows) {
  const int64_t weights = header.n * header.depth;
  const int64_t by_macs = rows * weights / macs_per_ns(header.isa),
                by_bytes = weights / kBytesPerNs;
  return by_macs > by_bytes ? by_macs : by_bytes;
}

void linear(const LinearArgs& args, const Parallel& parallel) {
  const PackedHeader& header = *args.matrix.header;
  if (args.rows == 0 || header.n == 0) return;
  const int64_t panels = panel_count(header.n, header.isa);
  const int64_t group = row_group(header.isa), row_groups = ceil_div(args.rows, group);
  const int64_t weights = header.n * header.depth;
  const Grid grid =
      choose_grid(row_groups, panels, parallel.threads, weights >= args.rows * header.depth);

  IgemmArgs whole;
  whole.matrix = args.matrix;
  whole.a = args.input;
  whole.a_row_stride = args.input_row_stride;
  whole.out = args.out;
  whole.out_row_stride = header.n * stored_bytes(header.epilogue, args.floats);
  whole.residual = args.residual;
  whole.residual_row_stride = args.residual_row_stride;
  whole.residual_signed = args.residual_signed;
  auto* codes = static_cast<uint8_t*>(args.workspace);
  parallel.for_each_range(
      grid.rows * grid.panels, linear_work_ns(header, args.rows), [&](int64_t begin, int64_t end) {
        if (end - begin == grid.rows * grid.panels) {  // one thread: nothing to share out
          IgemmArgs all = whole;
          all.row_end = args.rows;
          all.panel_end = panels;
          all.next = args.next;
          run_part(args, all, codes);
          return;
        }
        for (int64_t part = begin; part < end; ++part) {
          const int64_t row = part / grid.panels, panel = part % grid.panels;
          IgemmArgs block = whole;
          block.row_begin = row_groups * row / grid.rows * group;
          const int64_t row_end = row_groups * (row + 1) / grid.rows * group;
          block.row_end = row_end < args.rows ? row_end : args.rows;
          block.panel_begin = panels * panel / grid.panels;
          block.panel_end = panels * (panel + 1) / grid.panels;
          run_part(args, block, codes + part * codes_bytes(args));
        }
      });
}

}  // namespace qk
