#include "csrc/fake_quant/cuda.h"

#include "csrc/base/float_types.h"
#include "csrc/quantize/cuda_grid.cuh"

namespace qk {
namespace {

template <typename T>
struct FakeQuant {
  static constexpr int kPerThread = 16 / sizeof(T);
  const T* x;
  T* y;
  int32_t qmin, qmax;
  DenseGrid grid;

  bool aligned() const { return cuda::is_aligned(x, 16) && cuda::is_aligned(y, 16); }

  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    auto v = cuda::load_vector<kCount>(x + first);
    cuda::GridCursor<Index> at(grid, first);
#pragma unroll
    for (int i = 0; i < kCount; ++i, at.next()) {
      from_float(fake_quant(to_float(v.v[i]), at.scale, at.inv_scale, at.zero_point, qmin, qmax),
                 &v.v[i]);
    }
    cuda::store_vector(y + first, v);
  }
};

template <typename T>
struct FakeQuantBackward {
  static constexpr int kPerThread = 16 / sizeof(T);
  const T* grad;
  const T* x;
  T* out;
  int32_t qmin, qmax;
  DenseGrid grid;

  bool aligned() const {
    return cuda::is_aligned(grad, 16) && cuda::is_aligned(x, 16) && cuda::is_aligned(out, 16);
  }

  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    auto g = cuda::load_vector<kCount>(grad + first);
    const auto v = cuda::load_vector<kCount>(x + first);
    cuda::GridCursor<Index> at(grid, first);
#pragma unroll
    for (int i = 0; i < kCount; ++i, at.next()) {
      const float scaled = to_float(v.v[i]) * at.inv_scale;
      if (!fake_quant_passes(scaled, at.zero_point, qmin, qmax)) g.v[i] = T{};
    }
    cuda::store_vector(out + first, g);
  }
};

template <typename T>
cudaError_t forward(const FakeQuantCudaArgs& a, cudaStream_t stream) {
  return cuda::launch_elementwise(
      FakeQuant<T>{static_cast<const T*>(a.x), static_cast<T*>(a.y), a.qmin, a.qmax, a.grid},
      a.grid.size, stream);
}

template <typename T>
cudaError_t backward(const FakeQuantBackwardCudaArgs& a, cudaStream_t stream) {
  return cuda::launch_elementwise(
      FakeQuantBackward<T>{static_cast<const T*>(a.grad), static_cast<const T*>(a.x),
                           static_cast<T*>(a.out), a.qmin, a.qmax, a.grid},
      a.grid.size, stream);
}

}  // namespace

cudaError_t fake_quant_cuda(const FakeQuantCudaArgs& args, cudaStream_t stream) {
  return with_float_type(args.type,
                         [&](auto zero) { return forward<decltype(zero)>(args, stream); });
}

cudaError_t fake_quant_backward_cuda(const FakeQuantBackwardCudaArgs& args, cudaStream_t stream) {
  return with_float_type(args.type,
                         [&](auto zero) { return backward<decltype(zero)>(args, stream); });
}

}  // namespace qk
