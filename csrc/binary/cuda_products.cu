// Packed signs on CUDA: binary.h's words, and the convolution of them.
#include "csrc/base/cuda.cuh"
#include "csrc/base/cuda_elementwise.cuh"
#include "csrc/base/float_types.h"
#include "csrc/binary/cuda.h"

namespace qk {
namespace {

constexpr int kProductThreads = 256, kProductWarps = kProductThreads / cuda::kWarpSize;
constexpr int kPixels = 4;  // of a warp: they share the words of the weight
static_assert(kBinaryBlock == cuda::kWarpSize);

// A thread a word, the rows of one word side by side: their elements are neighbours where a row is
// not contiguous.
template <typename T>
struct PackWords {
  static constexpr int kPerThread = 1;
  BinaryPackArgs args;

  bool aligned() const { return true; }

  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    const auto rows = static_cast<Index>(args.rows), inner = static_cast<Index>(args.inner);
    const auto word = static_cast<int64_t>(first / rows);
    const Index row = first % rows;
    const T* x = static_cast<const T*>(args.x) +
                 static_cast<int64_t>(row / inner) * args.outer_stride +
                 static_cast<int64_t>(row % inner) * args.inner_stride + word * 64 * args.stride;
    const int64_t left = args.n - word * 64;
    uint64_t bits = 0;
#pragma unroll 8
    for (int k = 0; k < 64; ++k) {
      if (k < left) bits |= uint64_t{to_float(x[k * args.stride]) >= 0.0f} << k;
    }
    args.out[static_cast<int64_t>(row) * ((args.n + 63) / 64) + word] = bits;
  }
};

// A warp a word of a contiguous row: its lanes vote.
template <typename T>
__global__ void __launch_bounds__(kProductThreads)
    pack_rows_kernel(const __grid_constant__ BinaryPackArgs args, int64_t total) {
  const int64_t words = (args.n + 63) / 64;
  const uint32_t lane = threadIdx.x % cuda::kWarpSize;
  const int64_t mine = int64_t{blockIdx.x} * kProductWarps + threadIdx.x / cuda::kWarpSize;
  if (mine >= total) return;
  const int64_t row = mine / words, word = mine % words;
  const T* x = static_cast<const T*>(args.x) + row / args.inner * args.outer_stride +
               row % args.inner * args.inner_stride;
  uint64_t bits = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t k = word * 64 + half * 32 + lane;
    const bool positive = k < args.n && to_float(x[k]) >= 0.0f;
    bits |= uint64_t{__ballot_sync(cuda::kAllLanes, positive)} << (half * 32);
  }
  if (lane == 0) args.out[mine] = bits;
}

// One output pixel: where its first tap lies, and what was counted.
struct Counted {
  int64_t image;  // in pixels of the input
  int64_t row, column;
  int32_t ones = 0, taps = 0;
};

// A warp: kPixels pixels of one block of output channels, a lane a channel.
__global__ void __launch_bounds__(kProductThreads)
    sign_product_kernel(const __grid_constant__ BinaryConvArgs args, int64_t pixels) {
  const uint32_t lane = threadIdx.x % cuda::kWarpSize, warp = threadIdx.x / cuda::kWarpSize;
  const int64_t first = (int64_t{blockIdx.x} * kProductWarps + warp) * kPixels;
  if (first >= pixels) return;
  const int64_t words = (args.in_channels + 63) / 64;
  const uint64_t* weight =
      args.weight + int64_t{blockIdx.y} * args.kernel[0] * args.kernel[1] * words * kBinaryBlock +
      lane;
  Counted out[kPixels];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    // Pixels beyond the last repeat it, and are not stored.
    const int64_t pixel = first + p < pixels ? first + p : pixels - 1;
    const int64_t row = pixel / args.out_size[1];
    out[p].image = row / args.out_size[0] * args.size[0] * args.size[1];
    out[p].row = row % args.out_size[0] * args.stride[0] - args.padding[0];
    out[p].column = pixel % args.out_size[1] * args.stride[1] - args.padding[1];
  }
#pragma unroll 1
  for (int ky = 0; ky < args.kernel[0]; ++ky) {
#pragma unroll 1
    for (int kx = 0; kx < args.kernel[1]; ++kx, weight += words * kBinaryBlock) {
      const uint64_t* input[kPixels];  // null: outside of the image
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        const int64_t y = out[p].row + ky * args.dilation[0];
        const int64_t x = out[p].column + kx * args.dilation[1];
        const bool inside = y >= 0 && y < args.size[0] && x >= 0 && x < args.size[1];
        input[p] = inside ? args.input + (out[p].image + y * args.size[1] + x) * words : nullptr;
        out[p].taps += inside;
      }
#pragma unroll 2
      for (int64_t k = 0; k < words; ++k) {
        const uint64_t w = cuda::load_vector<1>(weight + k * kBinaryBlock).v[0];
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          if (input[p] == nullptr) continue;
          out[p].ones += __popcll(cuda::load_vector<1>(input[p] + k).v[0] ^ w);
        }
      }
    }
  }
  const int64_t channel = int64_t{blockIdx.y} * kBinaryBlock + lane;
  if (channel >= args.out_channels) return;
  const float scale = args.scale[channel];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    if (first + p >= pixels) break;
    const auto terms = static_cast<int32_t>(out[p].taps * args.in_channels);
    const float product = static_cast<float>(terms - 2 * out[p].ones) * scale;
    args.out[(first + p) * args.out_channels + channel] =
        args.bias == nullptr ? product : product + args.bias[channel];
  }
}

}  // namespace

cudaError_t binary_pack_cuda(const BinaryPackArgs& args, cudaStream_t stream) {
  const int64_t total = args.rows * binary_words(args.n);
  if (total == 0) return cudaSuccess;
  return with_float_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    if (args.stride != 1) return cuda::launch_elementwise(PackWords<T>{args}, total, stream);
    const int64_t blocks = (total + kProductWarps - 1) / kProductWarps;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return cuda::launch(pack_rows_kernel<T>, static_cast<unsigned>(blocks), kProductThreads, 0,
                        stream, args, total);
  });
}

cudaError_t binary_conv_cuda(const BinaryConvArgs& args, cudaStream_t stream) {
  const int64_t pixels = args.images * args.out_size[0] * args.out_size[1];
  if (pixels == 0 || args.out_channels == 0) return cudaSuccess;
  const int64_t a_block = kProductWarps * kPixels, blocks = (pixels + a_block - 1) / a_block;
  const int64_t channel_blocks = binary_blocks(args.out_channels);
  if (blocks > INT32_MAX || channel_blocks > 65535) return cudaErrorInvalidConfiguration;
  return cuda::launch(sign_product_kernel,
                      dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(channel_blocks)),
                      kProductThreads, 0, stream, args, pixels);
}

}  // namespace qk
