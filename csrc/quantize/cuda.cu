#include "csrc/quantize/cuda.h"

#include "csrc/base/float_types.h"
#include "csrc/quantize/cuda_grid.cuh"

namespace qk {
namespace {

template <typename T>
struct Quantize {
  static constexpr int kPerThread = 16 / sizeof(T);
  const T* x;
  uint8_t* q;
  int32_t qmin, qmax;
  DenseGrid grid;

  bool aligned() const { return cuda::is_aligned(x, 16) && cuda::is_aligned(q, kPerThread); }

  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    const auto from = cuda::load_vector<kCount>(x + first);
    cuda::Vector<uint8_t, kCount> to;
    cuda::GridCursor<Index> at(grid, first);
#pragma unroll
    for (int i = 0; i < kCount; ++i, at.next()) {
      to.v[i] = static_cast<uint8_t>(
          quantize(to_float(from.v[i]), at.inv_scale, at.zero_point, qmin, qmax));
    }
    cuda::store_vector(q + first, to);
  }
};

template <typename Q, typename T>
struct Dequantize {
  static constexpr int kPerThread = 16 / (sizeof(T) > sizeof(Q) ? sizeof(T) : sizeof(Q));
  const Q* q;
  T* x;
  DenseGrid grid;

  bool aligned() const {
    return cuda::is_aligned(q, kPerThread * sizeof(Q)) &&
           cuda::is_aligned(x, kPerThread * sizeof(T));
  }

  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    const auto from = cuda::load_vector<kCount>(q + first);
    cuda::Vector<T, kCount> to;
    cuda::GridCursor<Index> at(grid, first);
#pragma unroll
    for (int i = 0; i < kCount; ++i, at.next()) {
      from_float(dequantize(from.v[i], at.scale, at.zero_point), &to.v[i]);
    }
    cuda::store_vector(x + first, to);
  }
};

template <typename T>
cudaError_t quantize_from(const QuantizeCudaArgs& a, cudaStream_t stream) {
  return cuda::launch_elementwise(
      Quantize<T>{static_cast<const T*>(a.x), a.q, a.qmin, a.qmax, a.grid}, a.grid.size, stream);
}

template <typename Q, typename T>
cudaError_t dequantize_codes(const DequantizeCudaArgs& a, cudaStream_t stream) {
  return cuda::launch_elementwise(
      Dequantize<Q, T>{static_cast<const Q*>(a.q), static_cast<T*>(a.x), a.grid}, a.grid.size,
      stream);
}

template <typename T>
cudaError_t dequantize_to(const DequantizeCudaArgs& a, cudaStream_t stream) {
  switch (a.q_type) {
    case CodeType::kUInt8:
      return dequantize_codes<uint8_t, T>(a, stream);
    case CodeType::kInt8:
      return dequantize_codes<int8_t, T>(a, stream);
    case CodeType::kInt32:
      break;
  }
  return dequantize_codes<int32_t, T>(a, stream);
}

}  // namespace

cudaError_t quantize_cuda(const QuantizeCudaArgs& args, cudaStream_t stream) {
  return with_float_type(args.x_type,
                         [&](auto zero) { return quantize_from<decltype(zero)>(args, stream); });
}

cudaError_t dequantize_cuda(const DequantizeCudaArgs& args, cudaStream_t stream) {
  return with_float_type(args.x_type,
                         [&](auto zero) { return dequantize_to<decltype(zero)>(args, stream); });
}

}  // namespace qk
