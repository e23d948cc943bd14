#include "csrc/fake_quant_mask/cuda.h"

#include "csrc/base/float_types.h"
#include "csrc/quantize/cuda_grid.cuh"

namespace qk {
namespace {

// The elements of byte `byte` of the mask.
struct Bits {
  int64_t first;
  int count;

  template <typename Index>
  QK_DEVICE Bits(const MaskLayout& layout, int64_t size, Index byte) {
    const auto a_row = static_cast<Index>(layout.row_bytes);
    const int64_t row = static_cast<int64_t>(byte / a_row);
    const int64_t within = static_cast<int64_t>(byte % a_row) * 8;
    first = row * layout.row_elements + within;
    int64_t left = layout.row_elements - within;
    if (left > size - first) left = size - first;
    count = left < 8 ? static_cast<int>(left) : 8;
  }
};

// 8 elements as pieces of 16 bytes.
template <typename T>
struct Eight {
  static constexpr int kPiece = 16 / sizeof(T);
  T v[8];

  QK_DEVICE void load(const T* from, int count, bool vectors) {
    if (vectors) {
#pragma unroll
      for (int i = 0; i < 8; i += kPiece) {
        const auto piece = cuda::load_vector<kPiece>(from + i);
#pragma unroll
        for (int k = 0; k < kPiece; ++k) v[i + k] = piece.v[k];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = i < count ? from[i] : T{};
    }
  }
  QK_DEVICE void store(T* to, int count, bool vectors) const {
    if (vectors) {
#pragma unroll
      for (int i = 0; i < 8; i += kPiece) {
        cuda::Vector<T, kPiece> piece;
#pragma unroll
        for (int k = 0; k < kPiece; ++k) piece.v[k] = v[i + k];
        cuda::store_vector(to + i, piece);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < count) to[i] = v[i];
      }
    }
  }
};

template <typename T>
bool rows_align(const MaskLayout& layout, const void* a, const void* b) {
  return layout.row_elements * static_cast<int64_t>(sizeof(T)) % 16 == 0 &&
         cuda::is_aligned(a, 16) && cuda::is_aligned(b, 16);
}

template <typename T>
struct Mask {
  static constexpr int kPerThread = 1;
  FakeQuantMaskCudaArgs args;
  bool rows_are_aligned;

  bool aligned() const { return true; }
  template <int kCount, typename Index>
  QK_DEVICE void run(Index byte) const {
    const Bits at(args.layout, args.grid.size, byte);
    const bool vectors = rows_are_aligned && at.count == 8;
    Eight<T> v;
    v.load(static_cast<const T*>(args.x) + at.first, at.count, vectors);
    cuda::GridCursor<Index> grid(args.grid, static_cast<Index>(at.first));
    CodeEnds ends{args.qmin, args.qmax};
    if (args.grid.channels == 1) {
      ends = clamped_ends(args.floor, args.ceiling, grid.inv_scale, grid.zero_point, ends.qmin,
                          ends.qmax);
    }
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= at.count) break;
      const float x = to_float(v.v[i]), inv_scale = grid.inv_scale;
      const int32_t zp = grid.zero_point;
      bits |= uint32_t{fake_quant_passes(x * inv_scale, zp, ends.qmin, ends.qmax)} << i;
      if (args.codes != nullptr) {
        args.codes[at.first + i] =
            static_cast<uint8_t>(quantize(x, inv_scale, zp, ends.qmin, ends.qmax));
      }
      from_float(fake_quant(x, grid.scale, inv_scale, zp, ends.qmin, ends.qmax), &v.v[i]);
      grid.next();
    }
    v.store(static_cast<T*>(args.y) + at.first, at.count, vectors);
    args.mask[byte] = static_cast<uint8_t>(bits);
    if (bits != (1u << at.count) - 1) *args.clipped = true;
  }
};

template <typename T>
struct MaskBackward {
  static constexpr int kPerThread = 1;
  MaskBackwardCudaArgs args;
  bool rows_are_aligned;

  bool aligned() const { return true; }
  template <int kCount, typename Index>
  QK_DEVICE void run(Index byte) const {
    const Bits at(args.layout, args.size, byte);
    const bool vectors = rows_are_aligned && at.count == 8;
    Eight<T> v;
    v.load(static_cast<const T*>(args.grad) + at.first, at.count, vectors);
    const uint32_t bits = args.mask[byte];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if ((bits >> i & 1) == 0) v.v[i] = T{};
    }
    v.store(static_cast<T*>(args.out) + at.first, at.count, vectors);
  }
};

// A thread a byte of the mask; the index must also reach the elements.
template <class Op>
cudaError_t launch_bytes(const Op& op, const MaskLayout& layout, int64_t size,
                         cudaStream_t stream) {
  return size <= (int64_t{1} << 31)
             ? cuda::launch_elementwise_32(op, layout.bytes, stream)
             : cuda::launch_elementwise_by<uint64_t>(op, layout.bytes, stream);
}

template <typename T>
cudaError_t forward(const FakeQuantMaskCudaArgs& a, cudaStream_t stream) {
  return launch_bytes(Mask<T>{a, rows_align<T>(a.layout, a.x, a.y)}, a.layout, a.grid.size, stream);
}

template <typename T>
cudaError_t backward(const MaskBackwardCudaArgs& a, cudaStream_t stream) {
  return launch_bytes(MaskBackward<T>{a, rows_align<T>(a.layout, a.grad, a.out)}, a.layout, a.size,
                      stream);
}

}  // namespace

cudaError_t fake_quant_mask_cuda(const FakeQuantMaskCudaArgs& args, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(args.clipped, 0, sizeof(bool), stream);
  if (error != cudaSuccess || args.grid.size == 0) return error;
  return with_float_type(args.type,
                         [&](auto zero) { return forward<decltype(zero)>(args, stream); });
}

cudaError_t mask_backward_cuda(const MaskBackwardCudaArgs& args, cudaStream_t stream) {
  if (args.size == 0) return cudaSuccess;
  return args.type == FloatType::kFloat32 ? backward<uint32_t>(args, stream)
                                          : backward<uint16_t>(args, stream);
}

}  // namespace qk
