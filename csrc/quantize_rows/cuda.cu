#include "csrc/quantize_rows/cuda.h"

#include "csrc/base/float_types.h"
#include "csrc/observe/cuda_extremes.cuh"

namespace qk {
namespace {

constexpr int kQuantizeRowThreads = 128;

template <typename T, int kCount>
QK_DEVICE void quantize_row_elements(const QuantizeRowsArgs& args, const T* x, uint8_t* q,
                                     const DynamicGrid& grid, float inv_scale, int64_t i) {
  const auto from = cuda::load_vector<kCount>(x + i);
  cuda::Vector<uint8_t, kCount> to;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    to.v[k] = static_cast<uint8_t>(
        quantize(to_float(from.v[k]), inv_scale, grid.zero_point, args.qmin, args.qmax));
  }
  cuda::store_vector(q + i, to);
}

template <typename T>
__global__ void __launch_bounds__(kQuantizeRowThreads)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsArgs args) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t row = blockIdx.x, n = args.depth;
  const T* x = static_cast<const T*>(args.x) + row * args.row_stride;
  uint8_t* q = static_cast<uint8_t*>(args.q) + row * n;
  const auto found =
      cuda::join_block<kQuantizeRowThreads>(cuda::extremes_of<T, kQuantizeRowThreads>(x, n));
  const bool finite = found.nans + found.infinities == 0;
  // Of a row that is not finite the grid does not depend on them; an empty row has none.
  const bool some = found.low <= found.high;
  const DynamicGrid grid =
      choose_dynamic_grid(some ? found.low + 0.0f : 0.0f, some ? found.high + 0.0f : 0.0f, finite,
                          args.qmin, args.qmax, args.symmetric);
  if (threadIdx.x == 0) {
    args.scale[row] = grid.scale;
    args.zero_point[row] = grid.zero_point;
  }
  const float inv_scale = 1.0f / grid.scale;
  const bool aligned =
      reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(q) % kVector == 0;
  const int64_t vectors = aligned ? n / kVector * kVector : 0;
#pragma unroll 2
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < vectors;
       i += kQuantizeRowThreads * kVector) {
    quantize_row_elements<T, kVector>(args, x, q, grid, inv_scale, i);
  }
#pragma unroll 1
  for (int64_t i = vectors + threadIdx.x; i < n; i += kQuantizeRowThreads) {
    quantize_row_elements<T, 1>(args, x, q, grid, inv_scale, i);
  }
}

template <typename T>
cudaError_t launch_quantize_rows(const QuantizeRowsArgs& args, cudaStream_t stream) {
  return cuda::launch(quantize_rows_kernel<T>, static_cast<unsigned>(args.rows),
                      kQuantizeRowThreads, cuda::kJoinBytes<kQuantizeRowThreads>, stream, args);
}

}  // namespace

cudaError_t quantize_rows_cuda(const QuantizeRowsArgs& args, cudaStream_t stream) {
  QuantizeRowsArgs part = args;
  for (int64_t first = 0; first < args.rows; first += part.rows) {
    part.rows = args.rows - first < INT32_MAX ? args.rows - first : INT32_MAX;
    part.x = static_cast<const char*>(args.x) + first * args.row_stride * float_bytes(args.type);
    part.q = static_cast<uint8_t*>(args.q) + first * args.depth;
    part.scale = args.scale + first;
    part.zero_point = args.zero_point + first;
    const cudaError_t error = with_float_type(
        args.type, [&](auto zero) { return launch_quantize_rows<decltype(zero)>(part, stream); });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace qk
