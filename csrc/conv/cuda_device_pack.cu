#include "csrc/conv/cuda_device_pack.h"

#include <cstring>

#include "csrc/base/cuda.cuh"

namespace qk {
namespace {

constexpr int kPackThreads = 128;

// One part (cuda_pack.h), in numbers that a kernel can use.
struct PackPart {
  const int8_t* weight;
  const float* weight_scale;
  const int32_t* weight_zero_point;  // or null
  bool per_tensor, transposed, depthwise;
  const float* bias;  // or null
  const float* input_scale;
  const int32_t* input_zero_point;
  float output_scale;
  int32_t channels, in_group, out_group;
  int32_t kernel[kConvDims], taps[kConvDims], first[kConvDims], step[kConvDims];
  int64_t depth;  // of a row of the packed weight
  CudaPackedLayout layout;
  uint8_t* dst;
  bool is_8bit;  // the output
  uint8_t epilogue[sizeof(Epilogue)];
};

// The weight of output channel o, element e of [tap of the phase][channel].
QK_DEVICE int8_t weight_of(const PackPart& part, int64_t o, int64_t e) {
  const int64_t c = e % part.in_group;
  const int64_t tap = e / part.in_group;
  const int64_t t2 = tap % part.taps[2], t1 = tap / part.taps[2] % part.taps[1];
  const int64_t t0 = tap / part.taps[2] / part.taps[1];
  int64_t at = part.first[0] + t0 * part.step[0];
  at = at * part.kernel[1] + part.first[1] + t1 * part.step[1];
  at = at * part.kernel[2] + part.first[2] + t2 * part.step[2];
  const int64_t kernel_size = int64_t{part.kernel[0]} * part.kernel[1] * part.kernel[2];
  const int64_t row = part.transposed ? (o / part.out_group * part.in_group + c) * part.out_group +
                                            o % part.out_group
                                      : o * part.in_group + c;
  return part.weight[row * kernel_size + at];
}

QK_DEVICE int64_t whole_chunks(int64_t bytes) {
  return (bytes + kCudaChunk - 1) / kCudaChunk * kCudaChunk;
}

// Where that element goes.
QK_DEVICE int64_t place_of_weight(const PackPart& part, int64_t o, int64_t e) {
  const int64_t tap = e / part.depth;
  if (part.depthwise) return part.layout.weight + tap * whole_chunks(part.channels) + o;
  return part.layout.weight + o * part.layout.row_bytes + tap * whole_chunks(part.depth) +
         e % part.depth;
}

// Block o: output channel o. What lies behind the last of a row is zero already.
__global__ void __launch_bounds__(kPackThreads)
    pack_channel_kernel(const __grid_constant__ PackPart part) {
  const int64_t o = blockIdx.x;
  const int64_t count = int64_t{part.taps[0]} * part.taps[1] * part.taps[2] * part.in_group;
  int32_t sum = 0;
#pragma unroll 1
  for (int64_t e = threadIdx.x; e < count; e += kPackThreads) {
    const int8_t w = weight_of(part, o, e);
    part.dst[place_of_weight(part, o, e)] = static_cast<uint8_t>(w);
    sum += w;
  }
#pragma unroll
  for (int step = cuda::kWarpSize / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(cuda::kAllLanes, sum, step);
  }
  const uint32_t lane = threadIdx.x % cuda::kWarpSize, warp = threadIdx.x / cuda::kWarpSize;
  if (lane == 0) {
    cuda::shared_store_u32(cuda::shared_memory() + warp * 4, static_cast<uint32_t>(sum));
  }
  __syncthreads();
  const int32_t za = *part.input_zero_point;
  if (o == 0) {
    for (uint32_t i = threadIdx.x; i < sizeof(Epilogue); i += kPackThreads) {
      part.dst[i] = part.epilogue[i];
    }
    if (threadIdx.x < kPackedAlign) {
      part.dst[part.layout.padding + threadIdx.x] = static_cast<uint8_t>(za);
    }
  }
  if (threadIdx.x != 0) return;
  uint32_t total = 0;
#pragma unroll
  for (uint32_t w = 0; w < kPackThreads / cuda::kWarpSize; ++w) {
    total += cuda::shared_load_u32(cuda::shared_memory() + w * 4);
  }
  const int64_t grid = part.per_tensor ? 0 : o;
  const int32_t zw = part.weight_zero_point == nullptr ? 0 : part.weight_zero_point[grid];
  const FoldedColumn column = folded(
      static_cast<int32_t>(total), count, za, zw, *part.input_scale * part.weight_scale[grid],
      part.bias == nullptr ? nullptr : part.bias + o, part.is_8bit, part.output_scale);
  const auto put = [&](int64_t where, auto value) {
    reinterpret_cast<decltype(value)*>(part.dst + where)[o] = value;
  };
  put(part.layout.init, column.init);
  put(part.layout.zero_point, zw);
  put(part.layout.addend, column.addend);
  put(part.layout.mult, column.mult);
}

}  // namespace

cudaError_t pack_conv_on_device(const ConvDeviceSource& given, void* dst, cudaStream_t stream) {
  const ConvSource& source = given.source;
  const ConvShape& shape = source.shape;
  const int64_t bytes = packed_conv_cuda_bytes(shape, conv_cuda_facts(source));
  cudaError_t error = cudaMemsetAsync(dst, 0, static_cast<size_t>(bytes), stream);
  int64_t end = 0;
  for (int64_t i = 0; i < conv_phase_count(shape) && error == cudaSuccess; ++i) {
    const ConvCudaPart planned = conv_cuda_part(shape, i, end);
    end = planned.end();
    PackPart part{.weight = source.weight,
                  .weight_scale = source.weight_scale,
                  .weight_zero_point = source.weight_zero_point,
                  .per_tensor = source.per_tensor,
                  .transposed = shape.transposed != 0,
                  .depthwise = planned.depthwise,
                  .bias = source.bias,
                  .input_scale = given.input_scale,
                  .input_zero_point = given.input_zero_point,
                  .output_scale = source.output_scale,
                  .channels = static_cast<int32_t>(shape.out_channels),
                  .in_group = static_cast<int32_t>(shape.in_per_group()),
                  .out_group = static_cast<int32_t>(shape.out_per_group()),
                  .kernel = {},
                  .taps = {},
                  .first = {},
                  .step = {},
                  .depth = planned.depth,
                  .layout = planned.layout,
                  .dst = static_cast<uint8_t*>(dst) + planned.offset,
                  .is_8bit = source.epilogue.is_8bit(),
                  .epilogue = {}};
    std::memcpy(part.epilogue, &source.epilogue, sizeof(Epilogue));
    for (int d = 0; d < kConvDims; ++d) {
      const DimPhase& phase = planned.phase.dim[d];
      part.kernel[d] = static_cast<int32_t>(shape.kernel[d]);
      part.taps[d] = static_cast<int32_t>(phase.taps);
      part.first[d] = static_cast<int32_t>(phase.kernel_first);
      part.step[d] = static_cast<int32_t>(phase.kernel_step);
    }
    error = cuda::launch(pack_channel_kernel, static_cast<unsigned>(shape.out_channels),
                         kPackThreads, kPackThreads / cuda::kWarpSize * 4, stream, part);
  }
  return error;
}

}  // namespace qk
