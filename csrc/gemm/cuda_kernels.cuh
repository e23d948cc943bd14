// The kernels of linear on CUDA, for one signedness of the input: a GEMV for few rows, tiles on
// tensor cores for more. Instantiated in cuda_u8.cu and cuda_s8.cu.
//
//   few rows   a block computes 4 columns of all rows with dp4a, its threads sharing out K: bound
//   by
//              reading the weight, which is read once and past L1
//   aligned    rows of A that start at multiples of 16 bytes are copied asynchronously
//   general    any alignment, and weight zero points, at one size of tile
#pragma once

#include "csrc/base/cuda.cuh"
#include "csrc/gemm/cuda_tile.cuh"

namespace qk::cuda {

// Rows of A that are aligned to 16 bytes.
template <class T>
class AlignedRows {
 public:
  using Args = RowSource;
  QK_DEVICE AlignedRows(const Args& args, int64_t first_row, int64_t rows, int)
      : copies_(args.input, args.row_stride, args.depth, first_row, rows) {}
  QK_DEVICE void copy(uint32_t stage, int step) const { copies_.copy(stage, step); }
  QK_DEVICE int64_t output_row(int64_t m) const { return m; }

 private:
  RowCopies<T, T::kRows> copies_;
};

// Rows of A anywhere: a chunk is gathered byte by byte and stored at once, a whole ring ahead of
// its use.
template <class T>
class AnyRows {
 public:
  using Args = RowSource;
  QK_DEVICE AnyRows(const Args& args, int64_t first_row, int64_t rows, int)
      : args_(args), first_row_(first_row), rows_(rows) {}
  QK_DEVICE void copy(uint32_t stage, int step) const {
    const uint32_t chunk = threadIdx.x % T::kChunks;
    const int64_t k = int64_t{step} * T::kDepth + chunk * 16;
    const int count = clamp_count(args_.depth - k);
#pragma unroll 1
    for (uint32_t row = threadIdx.x / T::kChunks; row < T::kRows; row += T::kRowStep) {
      const uint8_t* from = args_.input + (first_row_ + row) * args_.row_stride + k;
      const int n = first_row_ + row < rows_ ? count : 0;
      shared_store_u128(stage + row * T::kDepth + (chunk ^ T::twist(row)) * 16,
                        n == 16 && args_.aligned ? load_16(from) : gather_16(from, n));
    }
  }
  QK_DEVICE int64_t output_row(int64_t m) const { return m; }

 private:
  const Args& args_;
  int64_t first_row_, rows_;
};

// ---- few rows
// ------------------------------------------------------------------------------------

constexpr int kGemvThreads = 128, kGemvColumns = 4;

// A block computes kGemvColumns columns of all rows, its threads sharing out K.
template <int kRows, bool kSigned>
__global__ void __launch_bounds__(kGemvThreads)
    gemv_kernel(const __grid_constant__ IgemmCudaArgs args,
                const __grid_constant__ RowSource source) {
  const int64_t first = int64_t{blockIdx.x} * kGemvColumns;
  // Columns past the end repeat the last one; what they give is not stored.
  const int8_t* weight[kGemvColumns];
#pragma unroll
  for (int c = 0; c < kGemvColumns; ++c) {
    weight[c] = args.weight + (first + c < args.n ? first + c : args.n - 1) * args.k;
  }
  int32_t sums[kRows][kGemvColumns + 1] = {};  // the last: the sum of the row's bytes
#pragma unroll 2
  for (int64_t k = threadIdx.x * 16; k < args.k; k += kGemvThreads * 16) {
    uint4 w[kGemvColumns];
#pragma unroll
    for (int c = 0; c < kGemvColumns; ++c) w[c] = load_16_once(weight[c] + k);
    const int count = clamp_count(source.depth - k);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* from = source.input + (r < args.m ? r : 0) * source.row_stride + k;
      const uint4 a = count == 16 && source.aligned ? load_16(from) : gather_16(from, count);
#pragma unroll
      for (int c = 0; c < kGemvColumns; ++c) {
        sums[r][c] = dot4<kSigned>(sums[r][c], a.x, w[c].x);
        sums[r][c] = dot4<kSigned>(sums[r][c], a.y, w[c].y);
        sums[r][c] = dot4<kSigned>(sums[r][c], a.z, w[c].z);
        sums[r][c] = dot4<kSigned>(sums[r][c], a.w, w[c].w);
      }
      if (args.zero_point != nullptr) {
        int32_t& sum = sums[r][kGemvColumns];
        sum = dot4<kSigned>(sum, a.x, 0x01010101u);
        sum = dot4<kSigned>(sum, a.y, 0x01010101u);
        sum = dot4<kSigned>(sum, a.z, 0x01010101u);
        sum = dot4<kSigned>(sum, a.w, 0x01010101u);
      }
    }
  }
  const uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  constexpr uint32_t kValues = kRows * (kGemvColumns + 1);
#pragma unroll
  for (uint32_t i = 0; i < kValues; ++i) {
    int32_t sum = sums[i / (kGemvColumns + 1)][i % (kGemvColumns + 1)];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      sum = wrapping_add(sum, __shfl_xor_sync(kAllLanes, sum, step));
    }
    if (lane == 0) {
      shared_store_u32(shared_memory() + (warp * kValues + i) * 4, static_cast<uint32_t>(sum));
    }
  }
  __syncthreads();
  const int64_t row = threadIdx.x / kGemvColumns, n = first + threadIdx.x % kGemvColumns;
  if (row >= args.m || row >= kRows || n >= args.n) return;
  const auto total = [&](uint32_t column) {
    uint32_t sum = 0;
#pragma unroll
    for (uint32_t part = 0; part < kGemvThreads / kWarpSize; ++part) {
      const uint32_t i = static_cast<uint32_t>(row) * (kGemvColumns + 1) + column;
      sum += shared_load_u32(shared_memory() + (part * kValues + i) * 4);
    }
    return static_cast<int32_t>(sum);
  };
  int32_t acc = wrapping_add(total(threadIdx.x % kGemvColumns), args.init[n]);
  if (args.zero_point != nullptr) {
    acc = wrapping_add(acc, -wrapping_multiply(total(kGemvColumns), args.zero_point[n]));
  }
  void* to =
      static_cast<uint8_t*>(args.out) + row * args.out_row_bytes + n * output_bytes(args.output);
  if (args.scales.row_scale != nullptr) {
    return store_float(args.output, args.scales.value(acc, row, n), to);
  }
  store_output(*args.epilogue, acc, args.addend[n], args.mult[n], to,
               args.residual ? args.residual + row * args.residual_row_bytes + n : nullptr,
               args.residual_signed);
}

template <bool kSigned>
cudaError_t launch_gemv(const IgemmCudaArgs& args, const RowSource& source, cudaStream_t stream) {
  const auto kernel = args.m == 1   ? gemv_kernel<1, kSigned>
                      : args.m == 2 ? gemv_kernel<2, kSigned>
                      : args.m <= 4 ? gemv_kernel<4, kSigned>
                                    : gemv_kernel<8, kSigned>;
  constexpr size_t kShared = kGemvThreads / kWarpSize * kCudaGemvRows * (kGemvColumns + 1) * 4;
  const auto blocks = static_cast<unsigned>((args.n + kGemvColumns - 1) / kGemvColumns);
  return launch(kernel, blocks, kGemvThreads, kShared, stream, args, source);
}

template <int kTile, template <class> class Loader, bool kSigned, bool kRowSums>
cudaError_t launch_tile(const IgemmCudaArgs& args, const RowSource& source, cudaStream_t stream) {
  using T = Tile<kTile>;
  const dim3 grid(static_cast<unsigned>(args.tiles_m * args.tiles_n),
                  static_cast<unsigned>(args.splits));
  return launch(igemm_kernel<T, Loader<T>, kSigned, kRowSums>, grid, T::kThreads,
                T::kStages * T::kStageBytes, stream, args, source);
}

// `tile`: of the plan; negative: the general kernel.
template <bool kSigned>
cudaError_t launch_linear(const IgemmCudaArgs& args, const RowSource& source, int tile,
                          cudaStream_t stream) {
  if (args.m <= kCudaGemvRows) return launch_gemv<kSigned>(args, source, stream);
  switch (tile) {
    case 0:
      return launch_tile<0, AlignedRows, kSigned, false>(args, source, stream);
    case 1:
      return launch_tile<1, AlignedRows, kSigned, false>(args, source, stream);
    case 2:
      return launch_tile<2, AlignedRows, kSigned, false>(args, source, stream);
    case 3:
      return launch_tile<3, AlignedRows, kSigned, false>(args, source, stream);
    case 4:
      return launch_tile<4, AlignedRows, kSigned, false>(args, source, stream);
    default:
      return launch_tile<kCudaGeneralTile, AnyRows, kSigned, true>(args, source, stream);
  }
}

}  // namespace qk::cuda
