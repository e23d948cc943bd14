#include "csrc/conv/block_rows.h"

#include <cstring>

namespace qk {
namespace {

// Where the pixels of a block lie: walks the runs of pixels that share an output row.
template <typename F>
void for_each_row_segment(const PhaseRun& run, int64_t begin, int64_t end, const F& f) {
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t row = pixel / run.count[2], x = pixel % run.count[2];
    const int64_t left = run.count[2] - x, length = left < end - pixel ? left : end - pixel;
    const int64_t y = row % run.count[1], z = row / run.count[1] % run.count[0];
    f(pixel - begin, row / (run.count[1] * run.count[0]), z, y, x, x + length);
    pixel += length;
  }
}

}  // namespace

PaddedRows::PaddedRows(const ConvArgs& args, const PaddedImage& image)
    : args_(args), image_(image) {
  if (args.floats.x != nullptr) quantizer_.emplace(args.floats);
}

void PaddedRows::write(int64_t row, uint8_t* dst) const {
  const PackedConvHeader& packed = *args_.packed;
  const int64_t channels = packed.shape.in_channels, width = args_.extent.in[2];
  int64_t source_row = row;
  if (image_.joined) {
    const int64_t height = args_.extent.in[1];
    const int64_t iy =
        source_index(packed.shape.padding_mode, row % image_.image_rows - image_.top, height);
    if (iy < 0) {
      std::memset(dst, packed.input_zero_point, static_cast<size_t>(image_.row_bytes));
      return;
    }
    source_row = row / image_.image_rows * height + iy;
  }
  const auto pixel = [&](int64_t x) {
    const int64_t ix = source_index(packed.shape.padding_mode, x - image_.left, width);
    uint8_t* to = dst + x * channels;
    if (ix < 0) {
      std::memset(to, packed.input_zero_point, static_cast<size_t>(channels));
    } else {
      copy(source_row, ix, 1, to);
    }
  };
  const int64_t begin = clamp(image_.left, 0, image_.pixels);
  const int64_t end = clamp(image_.left + width, begin, image_.pixels);
  for (int64_t x = 0; x < begin; ++x) pixel(x);
  copy(source_row, begin - image_.left, end - begin, dst + begin * channels);
  for (int64_t x = end; x < image_.pixels; ++x) pixel(x);
}

void PaddedRows::copy(int64_t row, int64_t x, int64_t count, uint8_t* dst) const {
  const int64_t channels = args_.packed->shape.in_channels, width = args_.extent.in[2];
  if (quantizer_) {
    const int64_t rows = args_.extent.in[0] * args_.extent.in[1];
    quantizer_->run(row / rows, row % rows * width + x, count, dst);
  } else {
    std::memcpy(dst, args_.input + (row * width + x) * channels,
                static_cast<size_t>(count * channels));
  }
}

void BlockRows::find(int64_t begin, int64_t end, int64_t channel) {
  uint8_t* windows = scratch_.windows;
  for_each_row_segment(
      run_, begin, end, [&](int64_t row, int64_t n, int64_t z, int64_t y, int64_t x0, int64_t x1) {
        const DimPhase* dim = run_.phase.dim;
        const ConvExtent& e = args_.extent;
        const int64_t pixel_bytes = args_.packed->shape.in_channels, taps = run_.plan.taps;
        const uint8_t** segment = scratch_.pointers + row * taps;
        for (int64_t t = 0; t < dim[0].taps * dim[1].taps; ++t) {
          const int64_t iz = source(0, z, t / dim[1].taps), iy = source(1, y, t % dim[1].taps);
          const int64_t image_index = (n * e.in[0] + iz) * e.in[1] + iy;
          const bool outside = iz < 0 || iy < 0;
          const uint8_t* image_row =
              outside ? nullptr : args_.input + image_index * e.in[2] * pixel_bytes + channel;
          if (run_.plan.runs) {
            find_runs(image_row, segment + t, x0, x1, &windows);
          } else {
            for (int64_t tx = 0; tx < dim[2].taps; ++tx) {
              find_tap(image_row, segment + t * dim[2].taps + tx, tx, x0, x1);
            }
          }
        }
      });
}

void BlockRows::find_even(int64_t begin, int64_t end, int64_t channel) {
  const DimPhase* dim = run_.phase.dim;
  const ConvExtent& e = args_.extent;
  const int64_t channels = args_.packed->shape.in_channels;
  const int64_t taps_in_row = run_.plan.runs ? 1 : dim[2].taps;
  const bool padded = run_.plan.padded_image;
  const uint8_t* image = padded ? image_ : args_.input;
  const int64_t row_bytes = padded ? run_.image.row_bytes : e.in[2] * channels;
  const uint8_t** pointer = scratch_.pointers;
  for (int64_t row = begin / run_.count[2]; row < end / run_.count[2]; ++row) {
    const int64_t y = row % run_.count[1], z = row / run_.count[1] % run_.count[0];
    const int64_t n = row / (run_.count[1] * run_.count[0]);
    for (int64_t t = 0; t < dim[0].taps * dim[1].taps; ++t) {
      const int64_t iz = source(0, z, t / dim[1].taps), iy = source(1, y, t % dim[1].taps);
      const uint8_t* from =
          iz < 0 || iy < 0 ? padding_ : image + ((n * e.in[0] + iz) * e.in[1] + iy) * row_bytes;
      for (int64_t x = 0; x < taps_in_row; ++x) {
        *pointer++ = from + x * dim[2].in_dilation * channels + channel;
      }
    }
  }
}

void BlockRows::find_joined(int64_t begin, int64_t end) {
  const PaddedImage& image = run_.image;
  const DimPhase& y = run_.phase.dim[1];
  const int64_t pixels = run_.count[1] * run_.count[2];
  const uint8_t** pointer = scratch_.pointers;
  for (int64_t n = begin / pixels; n < end / pixels; ++n) {
    for (int64_t t = 0; t < y.taps; ++t) {
      const int64_t row = n * image.image_rows + t * y.in_dilation;
      *pointer++ = image_ + row * image.row_bytes;
    }
  }
}

void BlockRows::move(int64_t count, int64_t bytes) {
  const int64_t pointers = count * run_.plan.taps;
  for (int64_t i = 0; i < pointers; ++i) scratch_.pointers[i] += bytes;
}

void BlockRows::find_outputs(int64_t begin, int64_t end) {
  const int64_t element = out_element(args_);
  for_each_row_segment(
      run_, begin, end, [&](int64_t row, int64_t n, int64_t z, int64_t y, int64_t x0, int64_t x1) {
        const DimPhase* dim = run_.phase.dim;
        const ConvExtent& e = args_.extent;
        const int64_t oz = dim[0].out_first + z * dim[0].out_step;
        const int64_t oy = dim[1].out_first + y * dim[1].out_step;
        for (int64_t x = x0; x < x1; ++x) {
          const int64_t ox = dim[2].out_first + x * dim[2].out_step;
          const int64_t pixel = ((n * e.out[0] + oz) * e.out[1] + oy) * e.out[2] + ox;
          scratch_.residual_offset[row + x - x0] = pixel * args_.packed->shape.out_channels;
          scratch_.out_offset[row + x - x0] = pixel * out_stride(args_) * element;
        }
      });
}

int64_t BlockRows::source(int d, int64_t j, int64_t tap) const {
  return source_index(args_.packed->shape.padding_mode, run_.phase.dim[d].position(j, tap),
                      args_.extent.in[d]);
}

void BlockRows::find_runs(const uint8_t* image_row, const uint8_t** pointers, int64_t x0,
                          int64_t x1, uint8_t** windows) const {
  const DimPhase& dim = run_.phase.dim[2];
  const int64_t taps = run_.plan.taps, pixel_bytes = args_.packed->shape.in_channels;
  int64_t x = x0;
  if (image_row == nullptr) {
    for (; x < x1; ++x, pointers += taps) *pointers = padding_;
    return;
  }
  const int64_t step = dim.in_stride * pixel_bytes;
  const int64_t inner_begin = clamp(run_.inner_begin, x0, x1);
  const int64_t inner_end = clamp(run_.inner_end, inner_begin, x1);
  for (; x < inner_begin; ++x, pointers += taps) *pointers = copy_window(image_row, x, windows);
  const uint8_t* p = image_row + dim.position(x, 0) * pixel_bytes;
  for (; x < inner_end; ++x, pointers += taps, p += step) *pointers = p;
  for (; x < x1; ++x, pointers += taps) *pointers = copy_window(image_row, x, windows);
}

const uint8_t* BlockRows::copy_window(const uint8_t* image_row, int64_t x,
                                      uint8_t** windows) const {
  const int64_t pixel_bytes = args_.packed->shape.in_channels;
  uint8_t* window = *windows;
  for (int64_t tap = 0; tap < run_.phase.dim[2].taps; ++tap) {
    const int64_t ix = source(2, x, tap);
    std::memcpy(*windows, ix < 0 ? padding_ : image_row + ix * pixel_bytes,
                static_cast<size_t>(pixel_bytes));
    *windows += pixel_bytes;
  }
  return window;
}

void BlockRows::find_tap(const uint8_t* image_row, const uint8_t** pointers, int64_t tap,
                         int64_t x0, int64_t x1) const {
  const DimPhase& dim = run_.phase.dim[2];
  const int64_t taps = run_.plan.taps, pixel_bytes = args_.packed->shape.in_channels;
  int64_t x = x0, begin, end;
  if (image_row == nullptr) {
    for (; x < x1; ++x, pointers += taps) *pointers = padding_;
    return;
  }
  inner_range(dim, tap, tap, args_.extent.in[2], run_.count[2], &begin, &end);
  begin = clamp(begin, x0, x1);
  end = clamp(end, begin, x1);
  const auto outside = [&] {
    const int64_t ix = source(2, x, tap);
    *pointers = ix < 0 ? padding_ : image_row + ix * pixel_bytes;
  };
  for (; x < begin; ++x, pointers += taps) outside();
  const uint8_t* p = image_row + dim.position(x, tap) * pixel_bytes;
  const int64_t step = dim.in_stride * pixel_bytes;
  for (; x < end; ++x, pointers += taps, p += step) *pointers = p;
  for (; x < x1; ++x, pointers += taps) outside();
}

}  // namespace qk
