#include "csrc/binary/binary.h"

#include "csrc/base/float_types.h"

namespace qk {
namespace {

// Elements of a task.
constexpr int64_t kTask = 16384;
// Calls f(begin, end) for tasks of kTask elements.
template <typename F>
void for_each_task(int64_t n, const Parallel& parallel, const F& f) {
  parallel.for_each_range((n + kTask - 1) / kTask, n / 4, [&](int64_t begin, int64_t end) {
    f(begin * kTask, end * kTask < n ? end * kTask : n);
  });
}

// Without branches, so that the compiler makes vectors of it.
template <typename T, bool kWeight>
void pass_gradient(const SignBackwardArgs& args, int64_t begin, int64_t end) {
  const T* grad = static_cast<const T*>(args.grad);
  const T* x = static_cast<const T*>(args.x);
  T* out = static_cast<T*>(args.out);
  for (int64_t i = begin; i < end; ++i) {
    const T g = grad[i];
    const float v = to_float(x[i]);
    bool passes = (v <= 1.0f) & (v >= -1.0f);
    if constexpr (kWeight) passes |= v * to_float(g) > 0.0f;
    out[i] = passes ? g : T{};
  }
}

// The convolution of one output pixel for one block of output channels.
struct Pixel {
  const BinaryConvArgs& args;
  int64_t words;
  BinarySegment segments[kBinarySegments];
  int64_t count = 0;
  int64_t taps = 0;  // inside the image

  // Taps that lie side by side in the image are one segment.
  void gather(int64_t image, int64_t row, int64_t column) {
    count = taps = 0;
    for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
      const int64_t y = row * args.stride[0] - args.padding[0] + ky * args.dilation[0];
      if (y < 0 || y >= args.size[0]) continue;
      for (int64_t kx = 0; kx < args.kernel[1]; ++kx) {
        const int64_t x = column * args.stride[1] - args.padding[1] + kx * args.dilation[1];
        if (x < 0 || x >= args.size[1]) continue;
        const uint64_t* input =
            args.input + ((image * args.size[0] + y) * args.size[1] + x) * words;
        const int64_t first = (ky * args.kernel[1] + kx) * words;
        ++taps;
        if (count > 0) {
          BinarySegment& last = segments[count - 1];
          if (last.input + last.words == input && last.first + last.words == first) {
            last.words += words;
            continue;
          }
        }
        segments[count++] = {input, first, words};
      }
    }
  }
};

}  // namespace

SignProductKernel select_sign_product_kernel(CpuFeatures features) {
#define QK_SIGN_PRODUCT_KERNEL(need, name) \
  if (has_features(features, need)) return name;
#include "csrc/binary/kernels.inc"
#undef QK_SIGN_PRODUCT_KERNEL
  return nullptr;
}

void binary_sign(const SignArgs& args, const Parallel& parallel) {
  with_float_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(args.x);
    T* y = static_cast<T*>(args.y);
    T plus, minus;
    from_float(1.0f, &plus);
    from_float(-1.0f, &minus);
    for_each_task(args.n, parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) y[i] = to_float(x[i]) >= 0.0f ? plus : minus;
    });
  });
}

void binary_sign_backward(const SignBackwardArgs& args, const Parallel& parallel) {
  with_float_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    for_each_task(args.n, parallel, [&](int64_t begin, int64_t end) {
      args.is_weight ? pass_gradient<T, true>(args, begin, end)
                     : pass_gradient<T, false>(args, begin, end);
    });
  });
}

void binary_pack(const BinaryPackArgs& args, const Parallel& parallel) {
  const int64_t words = binary_words(args.n);
  with_float_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    parallel.for_each_range(args.rows, args.rows * args.n, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(args.x) + row / args.inner * args.outer_stride +
                     row % args.inner * args.inner_stride;
        for (int64_t w = 0; w < words; ++w) {
          const int64_t left = args.n - w * 64, count = left < 64 ? left : 64;
          uint64_t bits = 0;
          for (int64_t k = 0; k < count; ++k) {
            bits |= uint64_t{to_float(x[(w * 64 + k) * args.stride]) >= 0.0f} << k;
          }
          args.out[row * words + w] = bits;
        }
      }
    });
  });
}

void binary_pack_weight(const uint64_t* rows, int64_t channels, int64_t words, uint64_t* out) {
  for (int64_t block = 0; block < binary_blocks(channels); ++block) {
    for (int64_t k = 0; k < words; ++k) {
      for (int64_t c = 0; c < kBinaryBlock; ++c) {
        const int64_t channel = block * kBinaryBlock + c;
        *out++ = channel < channels ? rows[channel * words + k] : 0;
      }
    }
  }
}

void binary_conv(const BinaryConvArgs& args, const Parallel& parallel) {
  const SignProductKernel kernel = select_sign_product_kernel();
  const int64_t words = binary_words(args.in_channels);
  const int64_t block_words = args.kernel[0] * args.kernel[1] * words * kBinaryBlock;
  const int64_t columns = args.out_size[1], rows = args.images * args.out_size[0];
  const int64_t pixels = rows * columns;
  const int64_t work = pixels * binary_blocks(args.out_channels) * block_words / kBinaryBlock;
  parallel.for_each_range(rows, work * 2, [&](int64_t begin, int64_t end) {
    Pixel pixel{args, words, {}, 0, 0};
    for (int64_t p = begin * columns; p < end * columns; ++p) {
      const int64_t image = p / columns / args.out_size[0];
      pixel.gather(image, p / columns % args.out_size[0], p % columns);
      const int32_t terms = static_cast<int32_t>(pixel.taps * args.in_channels);
      for (int64_t first = 0; first < args.out_channels; first += kBinaryBlock) {
        int32_t ones[kBinaryBlock];
        kernel(pixel.segments, pixel.count, args.weight + first / kBinaryBlock * block_words, ones);
        const int64_t left = args.out_channels - first;
        float* out = args.out + p * args.out_channels + first;
        for (int64_t c = 0; c < (left < kBinaryBlock ? left : kBinaryBlock); ++c) {
          const float product = static_cast<float>(terms - 2 * ones[c]) * args.scale[first + c];
          out[c] = args.bias == nullptr ? product : product + args.bias[first + c];
        }
      }
    }
  });
}

}  // namespace qk
