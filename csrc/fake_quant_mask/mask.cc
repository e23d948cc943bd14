#include "csrc/fake_quant_mask/mask.h"

#include <atomic>

namespace qk {
namespace {

// Output bytes above which the kernels store past the caches.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

int64_t elements(const GridLayout& grid) { return grid.strided.rows() * grid.strided.inner(); }

}  // namespace

FakeQuantMaskKernel select_fake_quant_mask_kernel(FloatType type, CpuFeatures features) {
#define QK_FAKE_QUANT_MASK_KERNEL(need, kernel_type, name) \
  if (type == kernel_type && has_features(features, need)) return name;
#define QK_MASK_BACKWARD_KERNEL(need, bytes, name)
#include "csrc/fake_quant_mask/kernels.inc"
#undef QK_FAKE_QUANT_MASK_KERNEL
#undef QK_MASK_BACKWARD_KERNEL
  return nullptr;
}

MaskBackwardKernel select_mask_backward_kernel(FloatType type, CpuFeatures features) {
#define QK_FAKE_QUANT_MASK_KERNEL(need, kernel_type, name)
#define QK_MASK_BACKWARD_KERNEL(need, bytes, name) \
  if (float_bytes(type) == bytes && has_features(features, need)) return name;
#include "csrc/fake_quant_mask/kernels.inc"
#undef QK_FAKE_QUANT_MASK_KERNEL
#undef QK_MASK_BACKWARD_KERNEL
  return nullptr;
}

MaskLayout mask_layout(const GridLayout& grid) {
  const int64_t total = elements(grid);
  if (total == 0) return {1, 0, 0};
  int64_t row = grid.strided.inner();
  if (grid.channel_dim == grid.strided.dims - 1) {
    row = detail::ChannelRows(grid, kGridRun).row_elements;
  }
  const int64_t row_bytes = (row + 7) / 8;
  return {row, row_bytes, total / row * row_bytes + (total % row + 7) / 8};
}

bool fake_quant_mask(const FakeQuantMaskArgs& args, const Parallel& parallel) {
  const FakeQuantMaskKernel kernel = select_fake_quant_mask_kernel(args.type);
  const MaskLayout layout = mask_layout(args.grid);
  const int64_t bytes = float_bytes(args.type);
  const bool stream = elements(args.grid) * bytes >= kStreamBytes;
  std::atomic<bool> clipped{false};
  for_each_grid_run(
      args.grid, parallel,
      [&](int64_t offset, int64_t x_offset, int64_t n, const GridSpan& span) {
        const bool clips = kernel({.x = static_cast<const char*>(args.x) + x_offset * bytes,
                                   .y = static_cast<char*>(args.y) + offset * bytes,
                                   .mask = args.mask + layout.byte_of(offset),
                                   .codes = args.codes ? args.codes + offset : nullptr,
                                   .n = n,
                                   .grid = span,
                                   .qmin = args.qmin,
                                   .qmax = args.qmax,
                                   .stream = stream});
        if (clips) clipped.store(true, std::memory_order_relaxed);
      },
      stream_fence);
  return clipped.load(std::memory_order_relaxed);
}

void fake_quant_mask_backward(const MaskBackwardArgs& args, const Parallel& parallel) {
  const MaskBackwardKernel kernel = select_mask_backward_kernel(args.type);
  const MaskLayout layout = mask_layout(args.grid);
  const int64_t bytes = float_bytes(args.type), total = elements(args.grid);
  const bool stream = args.out != args.grad && total * bytes >= kStreamBytes;
  const int64_t row = layout.row_elements, pieces = (row + kGridRun - 1) / kGridRun;
  const int64_t rows = (total + row - 1) / row;
  parallel.for_each_range(rows * pieces, total / 10, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % pieces * kGridRun, offset = task / pieces * row + first;
      int64_t n = row - first < kGridRun ? row - first : kGridRun;
      if (total - offset < n) n = total - offset;
      if (n <= 0) continue;
      kernel({.grad = static_cast<const char*>(args.grad) + offset * bytes,
              .mask = args.mask + layout.byte_of(offset),
              .out = static_cast<char*>(args.out) + offset * bytes,
              .n = n,
              .stream = stream});
    }
    stream_fence();
  });
}

}  // namespace qk
