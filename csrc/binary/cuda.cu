#include "csrc/binary/cuda.h"

#include "csrc/base/cuda_elementwise.cuh"
#include "csrc/base/float_types.h"

namespace qk {
namespace {

template <typename T>
struct Sign {
  static constexpr int kPerThread = 16 / sizeof(T);
  const T* x;
  T* y;

  bool aligned() const { return cuda::is_aligned(x, 16) && cuda::is_aligned(y, 16); }

  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    auto v = cuda::load_vector<kCount>(x + first);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      from_float(to_float(v.v[i]) >= 0.0f ? 1.0f : -1.0f, &v.v[i]);
    }
    cuda::store_vector(y + first, v);
  }
};

template <typename T>
struct SignBackward {
  static constexpr int kPerThread = 16 / sizeof(T);
  const T* grad;
  const T* x;
  T* out;
  bool is_weight;

  bool aligned() const {
    return cuda::is_aligned(grad, 16) && cuda::is_aligned(x, 16) && cuda::is_aligned(out, 16);
  }

  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    auto g = cuda::load_vector<kCount>(grad + first);
    const auto at = cuda::load_vector<kCount>(x + first);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float v = to_float(at.v[i]);
      const bool passes = (v <= 1.0f && v >= -1.0f) || (is_weight && v * to_float(g.v[i]) > 0.0f);
      if (!passes) g.v[i] = T{};
    }
    cuda::store_vector(out + first, g);
  }
};

template <typename T>
cudaError_t sign_of(const SignArgs& args, cudaStream_t stream) {
  return cuda::launch_elementwise(Sign<T>{static_cast<const T*>(args.x), static_cast<T*>(args.y)},
                                  args.n, stream);
}

template <typename T>
cudaError_t backward_of_sign(const SignBackwardArgs& args, cudaStream_t stream) {
  return cuda::launch_elementwise(
      SignBackward<T>{static_cast<const T*>(args.grad), static_cast<const T*>(args.x),
                      static_cast<T*>(args.out), args.is_weight},
      args.n, stream);
}

}  // namespace

cudaError_t binary_sign_cuda(const SignArgs& args, cudaStream_t stream) {
  return with_float_type(args.type,
                         [&](auto zero) { return sign_of<decltype(zero)>(args, stream); });
}

cudaError_t binary_sign_backward_cuda(const SignBackwardArgs& args, cudaStream_t stream) {
  return with_float_type(args.type,
                         [&](auto zero) { return backward_of_sign<decltype(zero)>(args, stream); });
}

}  // namespace qk
