#include "csrc/fake_quant/fake_quant.h"

namespace qk {
namespace {

// Output bytes above which the kernel stores past the caches.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

}  // namespace

FakeQuantKernel select_fake_quant_kernel(FloatType type, CpuFeatures features) {
#define QK_FAKE_QUANT_KERNEL(need, kernel_type, name) \
  if (type == kernel_type && has_features(features, need)) return name;
#include "csrc/fake_quant/kernels.inc"
#undef QK_FAKE_QUANT_KERNEL
  return nullptr;
}

void fake_quant(const FakeQuantArgs& args, const Parallel& parallel) {
  const FakeQuantKernel kernel = select_fake_quant_kernel(args.type);
  const char* x = static_cast<const char*>(args.x);
  char* y = static_cast<char*>(args.y);
  const int64_t bytes = float_bytes(args.type);
  const StridedLayout<2>& in = args.grid.strided;
  const bool stream = x != y && in.rows() * in.inner() * bytes >= kStreamBytes;
  for_each_grid_run(
      args.grid, parallel,
      [&](int64_t y_offset, int64_t x_offset, int64_t n, const GridSpan& span) {
        kernel({.x = x + x_offset * bytes,
                .y = y + y_offset * bytes,
                .n = n,
                .grid = span,
                .qmin = args.qmin,
                .qmax = args.qmax,
                .stream = stream});
      },
      stream_fence);
}

}  // namespace qk
