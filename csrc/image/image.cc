#include "csrc/image/image.h"

namespace qk {
namespace {

constexpr int64_t kRun = 512;  // pixels of a block
constexpr int64_t kRunsOfTask = 8;

}  // namespace

InterleaveKernel select_interleave_kernel(CpuFeatures features) {
#define QK_INTERLEAVE_KERNEL(need, name) \
  if (has_features(features, need)) return name;
#include "csrc/image/kernels.inc"
#undef QK_INTERLEAVE_KERNEL
  return nullptr;
}

void quantize_image(const QuantizeImageArgs& args, const Parallel& parallel) {
  const QuantizeKernel quantize = select_quantize_kernel(args.x_type);
  const InterleaveKernel interleave = select_interleave_kernel();
  const auto* x = static_cast<const uint8_t*>(args.x);
  const int64_t element = float_bytes(args.x_type), step = kRun * kRunsOfTask;
  const int64_t tasks_of_image = (args.pixels + step - 1) / step;
  float inv_scale[kMaxImageChannels];
  for (int64_t c = 0; c < (args.per_channel ? args.channels : 1); ++c) {
    inv_scale[c] = 1.0f / args.scale[c];
  }
  const int64_t work_ns = args.batch * args.channels * args.pixels / 8;
  parallel.for_each_range(args.batch * tasks_of_image, work_ns, [&](int64_t begin, int64_t end) {
    uint8_t block[kRun * kMaxImageChannels];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / tasks_of_image, first = task % tasks_of_image * step;
      const int64_t last = args.pixels < first + step ? args.pixels : first + step;
      for (int64_t p = first; p < last; p += kRun) {
        const int64_t pixels = last - p < kRun ? last - p : kRun;
        for (int64_t c = 0; c < args.channels; ++c) {
          const int64_t grid = args.per_channel ? c : 0;
          quantize({.x = x + (n * args.batch_stride + c * args.channel_stride + p) * element,
                    .q = block + c * kRun,
                    .n = pixels,
                    .grid = {args.scale + grid, inv_scale + grid, args.zero_point + grid, false},
                    .q_signed = args.q_signed,
                    .qmin = args.qmin,
                    .qmax = args.qmax});
        }
        interleave({.planes = block,
                    .plane_stride = kRun,
                    .channels = args.channels,
                    .out = args.q + (n * args.pixels + p) * args.channels,
                    .n = pixels});
      }
    }
  });
}

}  // namespace qk
