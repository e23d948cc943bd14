#include "csrc/pool/pool.h"

namespace qk {
namespace {

// Channels of one task: wide enough for long loads, narrow enough to share one large window.
constexpr int64_t kChannelBlock = 256;

// Outputs of a row whose windows lie inside the input: [begin, end).
struct Inside {
  int64_t begin, end;
};
Inside inside(const PoolGeometry& g, int dim) {
  if (g.adaptive) return {0, 0};
  const int64_t reach = (g.kernel[dim] - 1) * g.dilation[dim];
  const int64_t begin = (g.padding[dim] + g.stride[dim] - 1) / g.stride[dim];
  const int64_t last = g.in[dim] - 1 - reach + g.padding[dim];
  const int64_t end = last < 0 ? 0 : last / g.stride[dim] + 1;
  return {begin, end < g.out[dim] ? end : g.out[dim]};
}

// Calls f(windows, padded elements of each) for all outputs and channel blocks.
template <typename F>
void for_each_window(const uint8_t* q, uint8_t* out, const PoolGeometry& g,
                     const PoolStrides& strides, const Parallel& parallel, const F& f) {
  const int64_t blocks = (g.channels + kChannelBlock - 1) / kChannelBlock;
  const int64_t points = g.batch * g.out[0] * g.out[1] * g.out[2];
  const int64_t q_step = strides.q > 0 ? strides.q : g.channels;
  const int64_t out_step = strides.out > 0 ? strides.out : g.channels;
  const int64_t row = g.in[2] * q_step, plane = g.in[1] * row, volume = g.in[0] * plane;
  const Inside whole = inside(g, 2);
  // Each input byte is read about (kernel / stride)^2 times, from L1 after the first.
  const int64_t work_ns = (g.batch * g.in[0] * g.in[1] * g.in[2] + points) * g.channels / 8;
  parallel.for_each_range(points * blocks, work_ns, [&](int64_t begin, int64_t end) {
    int64_t spans_of = -1;  // the output row whose depth and height spans are known
    PoolSpan depth{}, height{};
    for (int64_t task = begin, count; task < end; task += count) {
      const int64_t point = task / blocks, c = (task % blocks) * kChannelBlock;
      const int64_t ow = point % g.out[2], output_row = point / g.out[2];
      const int64_t oh = output_row % g.out[1], od = output_row / g.out[1] % g.out[0];
      if (output_row != spans_of) {
        depth = window_span(g, 0, od);
        height = window_span(g, 1, oh);
        spans_of = output_row;
      }
      const PoolSpan width = window_span(g, 2, ow);
      const int64_t n = output_row / g.out[1] / g.out[0];
      count = 1;
      if (blocks == 1 && ow >= whole.begin && ow < whole.end) {
        count = whole.end - ow < end - task ? whole.end - ow : end - task;
      }
      const PoolWindows windows{
          .base =
              q + n * volume + depth.first * plane + height.first * row + width.first * q_step + c,
          .taps = {depth.taps, height.taps, width.taps},
          .stride = {g.adaptive ? plane : g.dilation[0] * plane,
                     g.adaptive ? row : g.dilation[1] * row,
                     g.adaptive ? q_step : g.dilation[2] * q_step},
          .channels = g.channels - c < kChannelBlock ? g.channels - c : kChannelBlock,
          .out = out + point * out_step + c,
          .count = count,
          .step = g.stride[2] * q_step,
          .out_step = out_step};
      f(windows, depth.padded * height.padded * width.padded);
    }
  });
}

}  // namespace

MaxPoolKernel select_max_pool_kernel(CpuFeatures features) {
#define QK_MAX_POOL_KERNEL(need, name) \
  if (has_features(features, need)) return name;
#define QK_AVG_POOL_KERNEL(need, name)
#include "csrc/pool/kernels.inc"
#undef QK_MAX_POOL_KERNEL
#undef QK_AVG_POOL_KERNEL
  return nullptr;
}

AvgPoolKernel select_avg_pool_kernel(CpuFeatures features) {
#define QK_MAX_POOL_KERNEL(need, name)
#define QK_AVG_POOL_KERNEL(need, name) \
  if (has_features(features, need)) return name;
#include "csrc/pool/kernels.inc"
#undef QK_MAX_POOL_KERNEL
#undef QK_AVG_POOL_KERNEL
  return nullptr;
}

void max_pool(const MaxPoolArgs& args, const Parallel& parallel) {
  const MaxPoolKernel kernel = select_max_pool_kernel();
  for_each_window(args.q, args.out, args.geometry, args.strides, parallel,
                  [&](const PoolWindows& windows, int64_t) { kernel(windows, args.is_signed); });
}

void avg_pool(const AvgPoolArgs& args, const Parallel& parallel) {
  const AvgPoolKernel kernel = select_avg_pool_kernel();
  for_each_window(args.q, args.out, args.geometry, args.strides, parallel,
                  [&](const PoolWindows& windows, int64_t padded) {
                    const int64_t taps = windows.taps[0] * windows.taps[1] * windows.taps[2];
                    kernel(windows, {.q_signed = args.q_signed,
                                     .out_signed = args.out_signed,
                                     .scale_ratio = args.scale_ratio,
                                     .divisor = window_divisor(args, padded, taps),
                                     .q_zero_point = args.q_zero_point,
                                     .out_zero_point = args.out_zero_point,
                                     .qmin = args.qmin,
                                     .qmax = args.qmax});
                  });
}

}  // namespace qk
