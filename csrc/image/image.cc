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

FloatImages FloatImages::from(int64_t n) const {
  FloatImages part = *this;
  part.x = static_cast<const uint8_t*>(x) + n * batch_stride * float_bytes(x_type);
  return part;
}

ImageQuantizer::ImageQuantizer(const FloatImages& images)
    : images_(images),
      quantize_(select_quantize_kernel(images.x_type)),
      interleave_(select_interleave_kernel()) {
  for (int64_t c = 0; c < (images.per_channel ? images.channels : 1); ++c) {
    inv_scale_[c] = 1.0f / images.scale[c];
  }
}

void ImageQuantizer::run(int64_t n, int64_t first, int64_t count, uint8_t* q) const {
  const int64_t channels = images_.channels, image = n * images_.batch_stride;
  if (images_.interleaved) {
    return quantize_run(image + first * channels, count * channels, 0, q);
  }
  uint8_t block[kRun * kMaxImageChannels];
  for (int64_t p = first; p < first + count; p += kRun) {
    const int64_t pixels = first + count - p < kRun ? first + count - p : kRun;
    for (int64_t c = 0; c < channels; ++c) {
      quantize_run(image + c * images_.channel_stride + p, pixels, images_.per_channel ? c : 0,
                   block + c * kRun);
    }
    interleave_({.planes = block,
                 .plane_stride = kRun,
                 .channels = channels,
                 .out = q + (p - first) * channels,
                 .pixel_stride = channels,
                 .n = pixels});
  }
}

void ImageQuantizer::quantize_run(int64_t offset, int64_t count, int64_t grid, uint8_t* q) const {
  quantize_({.x = static_cast<const uint8_t*>(images_.x) + offset * float_bytes(images_.x_type),
             .q = q,
             .n = count,
             .grid = {images_.scale + grid, inv_scale_ + grid, images_.zero_point + grid, false},
             .q_signed = images_.q_signed,
             .qmin = images_.qmin,
             .qmax = images_.qmax});
}

void quantize_image(const QuantizeImageArgs& args, const Parallel& parallel) {
  const ImageQuantizer quantizer(args.images);
  const int64_t channels = args.images.channels, step = kRun * kRunsOfTask;
  const int64_t tasks_of_image = (args.pixels + step - 1) / step;
  const int64_t work_ns = args.batch * channels * args.pixels / 8;
  parallel.for_each_range(args.batch * tasks_of_image, work_ns, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / tasks_of_image, first = task % tasks_of_image * step;
      const int64_t count = args.pixels - first < step ? args.pixels - first : step;
      quantizer.run(n, first, count, args.q + (n * args.pixels + first) * channels);
    }
  });
}

}  // namespace qk
