// Convolution on CUDA for uint8 input; a file of its own so that the two compile side by side.
#include "csrc/conv/cuda_kernels.cuh"

namespace qk::cuda {

cudaError_t launch_conv_u8(const IgemmCudaArgs& args, const PixelSource& source, int tile,
                           cudaStream_t stream) {
  return launch_conv<false>(args, source, tile, stream);
}

}  // namespace qk::cuda
