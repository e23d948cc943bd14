// The implicit GEMM of a convolution on CUDA, for one signedness of the input: how the rows of A
// are gathered from the image. Instantiated in cuda_u8.cu and cuda_s8.cu.
//
//   aligned   channels of a group fill chunks of 16 aligned bytes: asynchronous copies, the
//   position
//             of a chunk (tap and channel) kept from step to step; a padded pixel is copied from a
//             block that holds the zero point
//   general   any number of channels, runs, and weight zero points, at one size of tile
#pragma once

#include "csrc/conv/cuda.h"
#include "csrc/gemm/cuda_tile.cuh"

namespace qk::cuda {

// An output pixel's image and the input position of its first tap.
struct Pixel {
  int32_t image, at[kConvDims];
};

QK_DEVICE Pixel pixel_of(const PixelSource& s, uint32_t m) {
  Pixel p;
#pragma unroll
  for (int d = kConvDims - 1; d >= 0; --d) {
    const auto count = static_cast<uint32_t>(s.count[d]);
    p.at[d] = static_cast<int32_t>(m % count) * s.in_stride[d] + s.in_offset[d];
    m /= count;
  }
  p.image = static_cast<int32_t>(m);
  return p;
}

QK_DEVICE int64_t output_pixel(const PixelSource& s, int64_t row) {
  if (s.dense_output) return row;
  auto m = static_cast<uint32_t>(row);
  int64_t pixel = 0, step = 1;
#pragma unroll
  for (int d = kConvDims - 1; d >= 0; --d) {
    const auto count = static_cast<uint32_t>(s.count[d]);
    pixel += (int64_t{static_cast<int32_t>(m % count)} * s.out_step[d] + s.out_first[d]) * step;
    step *= s.out[d];
    m /= count;
  }
  return pixel + m * step;
}

// The first byte of the group's channels under a tap; nullptr: padding.
QK_DEVICE const uint8_t* pixel_under(const PixelSource& s, const Pixel& p,
                                     const int32_t (&tap)[kConvDims]) {
  int64_t pixel = p.image;
#pragma unroll
  for (int d = 0; d < kConvDims; ++d) {
    const int32_t i = source_index(s.mode, p.at[d] + tap[d] * s.in_dilation[d], s.in[d]);
    if (i < 0) return nullptr;
    pixel = pixel * s.in[d] + i;
  }
  return s.input + pixel * s.channels + int64_t{blockIdx.z} * s.group_channels;
}

// Where a thread's chunk is in K.
struct KPosition {
  int32_t tap[kConvDims], within;

  QK_DEVICE KPosition(const PixelSource& s, int32_t k) {
    int32_t t = k / s.chunked_depth;
    within = k % s.chunked_depth;
    const int32_t columns = s.runs ? 1 : s.taps[2];
    tap[2] = t % columns;
    t /= columns;
    tap[1] = t % s.taps[1];
    tap[0] = t / s.taps[1];
  }
  QK_DEVICE void advance(const PixelSource& s, int32_t bytes) {
    within += bytes;
    while (within >= s.chunked_depth) {
      within -= s.chunked_depth;
      if (++tap[2] != (s.runs ? 1 : s.taps[2])) continue;
      tap[2] = 0;
      if (++tap[1] != s.taps[1]) continue;
      tap[1] = 0;
      ++tap[0];
    }
  }
  // Bytes of the chunk that are in A; what follows meets weights of zero.
  QK_DEVICE int count(const PixelSource& s) const {
    return tap[0] < s.taps[0] ? clamp_count(s.depth - within) : 0;
  }
};

template <class T>
class AlignedPixels {
 public:
  using Args = PixelSource;
  QK_DEVICE AlignedPixels(const Args& s, int64_t first_row, int64_t rows, int first_step)
      : s_(s), k_(s, first_step * T::kDepth + static_cast<int32_t>(threadIdx.x % T::kChunks) * 16) {
    const uint32_t row = threadIdx.x / T::kChunks, chunk = threadIdx.x % T::kChunks;
    left_ = static_cast<int>(rows - first_row < T::kRows ? rows - first_row : T::kRows) -
            static_cast<int>(row);
    to_ = row * T::kDepth + (chunk ^ T::twist(row)) * 16;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      pixel_[i] = pixel_of(s, static_cast<uint32_t>(first_row) + row + i * T::kRowStep);
    }
  }

  QK_DEVICE void copy(uint32_t stage, int) {
    const int count = k_.count(s_);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int n = i * T::kRowStep < left_ ? count : 0;
      const uint8_t* from = n > 0 ? pixel_under(s_, pixel_[i], k_.tap) : nullptr;
      copy_async_16(stage + to_ + i * T::kRowStep * T::kDepth,
                    from != nullptr ? from + k_.within : s_.padding, n);
    }
    k_.advance(s_, T::kDepth);
  }
  QK_DEVICE int64_t output_row(int64_t m) const { return output_pixel(s_, m); }

 private:
  static constexpr int kMine = T::kRows / T::kRowStep;
  const Args& s_;
  KPosition k_;
  Pixel pixel_[kMine];
  uint32_t to_;
  int left_;
};

template <class T>
class AnyPixels {
 public:
  using Args = PixelSource;
  QK_DEVICE AnyPixels(const Args& s, int64_t first_row, int64_t rows, int first_step)
      : s_(s),
        k_(s, first_step * T::kDepth + static_cast<int32_t>(threadIdx.x % T::kChunks) * 16),
        first_row_(first_row),
        rows_(rows) {}

  QK_DEVICE void copy(uint32_t stage, int) {
    const uint32_t chunk = threadIdx.x % T::kChunks;
    const int count = k_.count(s_);
#pragma unroll 1
    for (uint32_t row = threadIdx.x / T::kChunks; row < T::kRows; row += T::kRowStep) {
      const int64_t m = first_row_ + row;
      uint4 v = {};
      if (m < rows_ && count > 0) {
        const Pixel p = pixel_of(s_, static_cast<uint32_t>(m));
        v = s_.runs ? part_of_run(p, count) : part_of_pixel(p, count);
      }
      shared_store_u128(stage + row * T::kDepth + (chunk ^ T::twist(row)) * 16, v);
    }
    k_.advance(s_, T::kDepth);
  }
  QK_DEVICE int64_t output_row(int64_t m) const { return output_pixel(s_, m); }

 private:
  QK_DEVICE uint4 part_of_pixel(const Pixel& p, int count) const {
    const uint8_t* pixel = pixel_under(s_, p, k_.tap);
    const uint8_t* from = pixel == nullptr ? s_.padding : pixel + k_.within;
    return count == 16 && (pixel == nullptr || s_.aligned) ? load_16(from) : gather_16(from, count);
  }

  // Bytes from `within` on of a row of the window: channels of neighbouring pixels.
  QK_DEVICE uint4 part_of_run(const Pixel& p, int count) const {
    int64_t row = p.image;
#pragma unroll
    for (int d = 0; d < 2; ++d) {
      const int32_t i = source_index(s_.mode, p.at[d] + k_.tap[d] * s_.in_dilation[d], s_.in[d]);
      if (i < 0) return gather_16(s_.padding, count);
      row = row * s_.in[d] + i;
    }
    const uint8_t* from = s_.input + row * s_.in[2] * s_.channels;
    const int64_t first = int64_t{p.at[2]} * s_.channels + k_.within;
    const int64_t end = int64_t{s_.in[2]} * s_.channels;
    if (first >= 0 && first + count <= end) return gather_16(from + first, count);
    uint32_t word[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i >= count) break;
      int32_t x = p.at[2] + (k_.within + i) / s_.channels;
      x = source_index(s_.mode, x, s_.in[2]);
      const uint32_t byte =
          x < 0 ? s_.padding[0] : from[x * s_.channels + (k_.within + i) % s_.channels];
      word[i / 4] |= byte << (i % 4 * 8);
    }
    return {word[0], word[1], word[2], word[3]};
  }

  const Args& s_;
  KPosition k_;
  int64_t first_row_, rows_;
};

template <int kTile, template <class> class Loader, bool kSigned, bool kRowSums>
cudaError_t launch_conv_tile(const IgemmCudaArgs& args, const PixelSource& source,
                             cudaStream_t stream) {
  using T = Tile<kTile>;
  const dim3 grid(static_cast<unsigned>(args.tiles_m * args.tiles_n),
                  static_cast<unsigned>(args.splits), static_cast<unsigned>(args.groups));
  return launch(igemm_kernel<T, Loader<T>, kSigned, kRowSums>, grid, T::kThreads,
                T::kStages * T::kStageBytes, stream, args, source);
}

template <bool kSigned>
cudaError_t launch_conv(const IgemmCudaArgs& args, const PixelSource& source, int tile,
                        cudaStream_t stream) {
  switch (tile) {
    case 1:
      return launch_conv_tile<1, AlignedPixels, kSigned, false>(args, source, stream);
    case 2:
      return launch_conv_tile<2, AlignedPixels, kSigned, false>(args, source, stream);
    case 3:
      return launch_conv_tile<3, AlignedPixels, kSigned, false>(args, source, stream);
    case 4:
      return launch_conv_tile<4, AlignedPixels, kSigned, false>(args, source, stream);
    default:
      return launch_conv_tile<kCudaGeneralTile, AnyPixels, kSigned, true>(args, source, stream);
  }
}

}  // namespace qk::cuda
