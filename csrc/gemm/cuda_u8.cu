// linear on CUDA for uint8 input; a file of its own so that the two compile side by side.
#include "csrc/gemm/cuda_kernels.cuh"

namespace qk::cuda {

cudaError_t launch_linear_u8(const IgemmCudaArgs& args, const RowSource& source, int tile,
                             cudaStream_t stream) {
  return launch_linear<false>(args, source, tile, stream);
}

}  // namespace qk::cuda
