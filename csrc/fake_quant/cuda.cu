#include "csrc/base/cuda.cuh"
#include "csrc/base/dtype.h"
#include "csrc/fake_quant/cuda.h"

namespace qk {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;

// The grid of the element at hand, reloaded only where a run of `inner` elements ends.
template <typename Index>
class Grid {
 public:
  __device__ Grid(const FakeQuantCudaArgs& args, Index element)
      : args_(args),
        channels_(static_cast<Index>(args.channels)),
        inner_(static_cast<Index>(args.inner)),
        channel_(element / inner_ % channels_),
        within_(element % inner_) {
    load();
  }

  // fake_quant of this element; moves on to the next.
  __device__ float apply(float x) {
    const float y = fake_quant(x, scale_, inv_scale_, zero_point_, args_.qmin, args_.qmax);
    if (++within_ == inner_) {
      within_ = 0;
      if (++channel_ == channels_) channel_ = 0;
      load();
    }
    return y;
  }

 private:
  __device__ void load() {
    scale_ = args_.scale[channel_];
    inv_scale_ = 1.0f / scale_;
    zero_point_ = args_.zero_point[channel_];
  }

  const FakeQuantCudaArgs& args_;
  const Index channels_, inner_;
  Index channel_, within_;
  float scale_, inv_scale_;
  int32_t zero_point_;
};

// Index is 32-bit where the tensor allows it: 64-bit division is slow on a GPU.
template <typename Index, bool kVector>
__global__ void __launch_bounds__(kThreads)
    fake_quant_kernel(const __grid_constant__ FakeQuantCudaArgs args, Index size) {
  const Index first = (static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x) * kPerThread;
  if (first >= size) return;
  Grid<Index> grid(args, first);
  if (kVector && size - first >= kPerThread) {
    uint4 v = cuda::load_16_in_place(args.x + first);
    v.x = float_bits(grid.apply(bits_float(v.x)));
    v.y = float_bits(grid.apply(bits_float(v.y)));
    v.z = float_bits(grid.apply(bits_float(v.z)));
    v.w = float_bits(grid.apply(bits_float(v.w)));
    cuda::store_16(args.y + first, v);
    return;
  }
  for (Index i = first; i < size && i - first < kPerThread; ++i) args.y[i] = grid.apply(args.x[i]);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename Index>
cudaError_t launch(const FakeQuantCudaArgs& args, Index size, cudaStream_t stream) {
  constexpr Index kPerBlock = kThreads * kPerThread;
  const Index blocks = (size - 1) / kPerBlock + 1;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const auto kernel = is_aligned(args.x) && is_aligned(args.y) ? fake_quant_kernel<Index, true>
                                                               : fake_quant_kernel<Index, false>;
  return cuda::launch(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, args, size);
}

}  // namespace

cudaError_t fake_quant_cuda(const FakeQuantCudaArgs& args, cudaStream_t stream) {
  const int64_t size = args.outer * args.channels * args.inner;
  if (size == 0) return cudaSuccess;
  if (size < (int64_t{1} << 31)) return launch<uint32_t>(args, static_cast<uint32_t>(size), stream);
  return launch<uint64_t>(args, static_cast<uint64_t>(size), stream);
}

}  // namespace qk
