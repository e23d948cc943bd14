#include "csrc/quantize_rows/quantize_rows.h"

#include <limits>

#include "csrc/observe/observe.h"
#include "csrc/quantize/quantize.h"

namespace qk {
namespace {

DynamicGrid grid_of(const QuantizeRowsArgs& args, const void* x, MinMaxKernel kernel) {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  if (args.depth == 0) low = high = 0.0f;
  const bool nan =
      kernel({.x = x, .n = args.depth, .low = &low, .high = &high, .per_element = false});
  // + 0.0f: which zero a minimum finds depends on the order.
  return choose_dynamic_grid(low + 0.0f, high + 0.0f, !nan && is_finite(low) && is_finite(high),
                             args.qmin, args.qmax, args.symmetric);
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args, const Parallel& parallel) {
  const MinMaxKernel extremes = select_minmax_kernel(args.type);
  const QuantizeKernel codes = select_quantize_kernel(args.type);
  const auto* x = static_cast<const char*>(args.x);
  auto* q = static_cast<char*>(args.q);
  const int64_t row_bytes = args.row_stride * float_bytes(args.type);
  const int64_t work_ns = args.rows * (args.depth / 6 + 20);
  parallel.for_each_range(args.rows, work_ns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const DynamicGrid grid = grid_of(args, x + row * row_bytes, extremes);
      args.scale[row] = grid.scale;
      args.zero_point[row] = grid.zero_point;
      const float inv_scale = 1.0f / grid.scale;
      codes({.x = x + row * row_bytes,
             .q = q + row * args.depth,
             .n = args.depth,
             .grid = {&grid.scale, &inv_scale, &grid.zero_point, false},
             .q_signed = args.q_signed,
             .qmin = args.qmin,
             .qmax = args.qmax});
    }
  });
}

}  // namespace qk
