#include "csrc/pool/cuda.h"

#include <type_traits>

#include "csrc/base/cuda_elementwise.cuh"

namespace qk {
namespace {

// The window of output element `first` and the channels behind it.
struct Window {
  const uint8_t* base;
  int32_t taps[3], padded = 1;
  int64_t step[3];  // bytes between taps

  template <typename Index>
  QK_DEVICE Window(const PoolGeometry& g, const uint8_t* q, Index first) {
    const auto channels = static_cast<Index>(g.channels);
    Index point = first / channels;
    base = q + first % channels;
    int64_t bytes = g.channels;
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      const auto out = static_cast<Index>(g.out[d]);
      const PoolSpan span = window_span(g, d, static_cast<std::make_signed_t<Index>>(point % out));
      point /= out;
      taps[d] = static_cast<int32_t>(span.taps);
      padded *= static_cast<int32_t>(span.padded);
      base += span.first * bytes;
      step[d] = g.adaptive ? bytes : g.dilation[d] * bytes;
      bytes *= g.in[d];
    }
    base += point * bytes;
  }
  QK_DEVICE int32_t inside() const { return taps[0] * taps[1] * taps[2]; }

  // Calls f on the kCount codes of each tap.
  template <int kCount, typename F>
  QK_DEVICE void for_each_tap(const F& f) const {
#pragma unroll 1
    for (int32_t d = 0; d < taps[0]; ++d) {
#pragma unroll 1
      for (int32_t h = 0; h < taps[1]; ++h) {
        const uint8_t* tap = base + d * step[0] + h * step[1];
#pragma unroll 1
        for (int32_t w = 0; w < taps[2]; ++w, tap += step[2]) f(cuda::load_vector<kCount>(tap));
      }
    }
  }
};

struct MaxPool {
  static constexpr int kPerThread = 16;
  MaxPoolArgs args;

  bool aligned() const {
    return args.geometry.channels % kPerThread == 0 && cuda::is_aligned(args.q, kPerThread) &&
           cuda::is_aligned(args.out, kPerThread);
  }
  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    cuda::Vector<uint8_t, kCount> best;
#pragma unroll
    for (int i = 0; i < kCount; ++i) best.v[i] = args.is_signed ? 0x80 : 0;
    Window(args.geometry, args.q, first)
        .for_each_tap<kCount>([&](const cuda::Vector<uint8_t, kCount>& tap) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            if (byte_value(tap.v[i], args.is_signed) > byte_value(best.v[i], args.is_signed)) {
              best.v[i] = tap.v[i];
            }
          }
        });
    cuda::store_vector(args.out + first, best);
  }
};

struct AvgPool {
  static constexpr int kPerThread = 4;
  AvgPoolArgs args;

  bool aligned() const {
    return args.geometry.channels % kPerThread == 0 && cuda::is_aligned(args.q, kPerThread) &&
           cuda::is_aligned(args.out, kPerThread);
  }
  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    const Window window(args.geometry, args.q, first);
    int32_t sum[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = -window.inside() * args.q_zero_point;
    window.for_each_tap<kCount>([&](const cuda::Vector<uint8_t, kCount>& tap) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += byte_value(tap.v[i], args.q_signed);
    });
    const int32_t divisor = window_divisor(args, window.padded, window.inside());
    cuda::Vector<uint8_t, kCount> out;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out.v[i] = static_cast<uint8_t>(
          mean_code(sum[i], args.scale_ratio, divisor, args.out_zero_point, args.qmin, args.qmax));
    }
    cuda::store_vector(args.out + first, out);
  }
};

// Whether 32 bits hold the places in an image of the output, and what window_span computes.
bool is_narrow(const PoolGeometry& g) {
  for (int d = 0; d < 3; ++d) {
    const int64_t reach = g.adaptive ? 1 : g.kernel[d] * g.dilation[d] + g.stride[d];
    const int64_t most = g.adaptive ? g.in[d] * (g.out[d] + 2) : g.in[d] + g.padding[d] + reach;
    if (most > INT32_MAX) return false;
  }
  return g.out[0] * g.out[1] * g.out[2] * g.channels <= INT32_MAX;
}

// One launch for as many images as 32-bit indices reach.
template <class Op, class Args>
cudaError_t launch_pool(Args args, cudaStream_t stream) {
  PoolGeometry& g = args.geometry;
  const int64_t image = g.out[0] * g.out[1] * g.out[2] * g.channels, batch = g.batch;
  if (!is_narrow(g)) {
    return cuda::launch_elementwise_by<uint64_t>(Op{args}, batch * image, stream);
  }
  const int64_t most = image > 0 ? INT32_MAX / image : 1;
  for (int64_t first = 0; first < batch; first += most) {
    g.batch = batch - first < most ? batch - first : most;
    const cudaError_t error = cuda::launch_elementwise_32(Op{args}, g.batch * image, stream);
    if (error != cudaSuccess) return error;
    args.q += g.batch * g.in[0] * g.in[1] * g.in[2] * g.channels;
    args.out += g.batch * image;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t max_pool_cuda(const MaxPoolArgs& args, cudaStream_t stream) {
  return launch_pool<MaxPool>(args, stream);
}

cudaError_t avg_pool_cuda(const AvgPoolArgs& args, cudaStream_t stream) {
  return launch_pool<AvgPool>(args, stream);
}

}  // namespace qk
