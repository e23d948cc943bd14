#include "csrc/fake_quant/fake_quant.h"

#include <algorithm>

namespace qk {
namespace {

// Elements in one task: 16 KiB in and out, well inside L1.
constexpr int64_t kTaskElements = 4096;

}  // namespace

FakeQuantRunKernel select_fake_quant_kernel(CpuFeatures features) {
#define QK_FAKE_QUANT_KERNEL(need, name) \
  if (has_features(features, need)) return name;
#include "csrc/fake_quant/kernels.inc"
#undef QK_FAKE_QUANT_KERNEL
  return nullptr;
}

void fake_quant(const FakeQuantArgs& args, const Parallel& parallel) {
  const FakeQuantRunKernel kernel = select_fake_quant_kernel();
  const int64_t runs = args.outer * args.channels;
  const int64_t tasks_per_run = (args.inner + kTaskElements - 1) / kTaskElements;
  const int64_t work_ns = runs * args.inner / 8;
  parallel.for_each_range(runs * tasks_per_run, work_ns, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t run = task / tasks_per_run, channel = run % args.channels;
      const int64_t first = (task % tasks_per_run) * kTaskElements;
      const int64_t n = std::min(kTaskElements, args.inner - first);
      const int64_t offset = run * args.inner + first;
      kernel(args.x + offset, args.y + offset, n, args.scale[channel], args.zero_point[channel],
             args.qmin, args.qmax);
    }
  });
}

}  // namespace qk
