// linear on Hopper's own instructions, for sm_90a alone: another way to the sums of cuda_tile.cuh.
// Off unless it is asked for (docs/cuda.md): no GPU has run it.
//
// Layout: a block computes 128 x 128 outputs, tile after tile. A stage of the ring holds 128 bytes
//   of K of 128 rows of A and of W, as boxes of cuda_sm90.cuh.
// Numbers: those of cuda_tile.cuh: the same sums, and its epilogue.
// Tricks: one thread of the third warpgroup fills the ring, by TMA, as far ahead as there is room,
//   over the end of a tile too; it takes care of every edge, as what lies outside of a matrix is
//   zero. The other two warpgroups multiply 64 rows each and never write to the ring. A barrier a
//   stage says that it is full, another that all 8 warps have read it. The epilogue has shared
//   memory of its own, so that the ring fills during it.
#include "csrc/base/cuda_sm90.cuh"
#include "csrc/gemm/cuda_tile.cuh"

namespace qk::cuda {
namespace {

// In the words of cuda_tile.cuh, for its epilogue.
struct WgmmaTile {
  static constexpr int kRows = 128, kColumns = 128, kDepth = kBoxBytes;
  static constexpr int kStages = 4;
  static constexpr int kThreads = 2 * kWarpgroupThreads;  // that multiply
  static constexpr int kBlockThreads = kThreads + kWarpgroupThreads;
  static constexpr int kWarpRows = 16, kWarpColumns = kColumns;
  static constexpr int kMmaRows = 1, kMmaColumns = kColumns / 8;
  static constexpr uint32_t kABytes = kRows * kDepth, kStageBytes = (kRows + kColumns) * kDepth;
  static constexpr uint32_t kRing = kStages * kStageBytes, kBarriers = 2 * kStages * 8;
  // The plan speaks of the tile of the same size.
  static_assert(kRows == kCudaTiles[kCudaWgmmaTile].rows);
  static_assert(kColumns == kCudaTiles[kCudaWgmmaTile].columns);
};

constexpr uint32_t align_to_box(uint32_t bytes) {
  return (bytes + kBoxAlign - 1) / kBoxAlign * kBoxAlign;
}
// In front of the ring: the patches of the epilogue.
constexpr uint32_t kPatches =
    align_to_box(Patch<WgmmaTile, 4>::kWarpBytes * (WgmmaTile::kThreads / kWarpSize));
constexpr uint32_t kSharedBytes = kPatches + WgmmaTile::kRing + WgmmaTile::kBarriers + kBoxAlign;
static_assert(kSharedBytes <= 227 << 10);

// The stages of the ring one after the other, and the parity of the phase of their barriers.
template <class T>
struct RingPlace {
  uint32_t ring, stage = 0, parity = 0;

  QK_DEVICE explicit RingPlace(uint32_t at) : ring(at) {}
  QK_DEVICE uint32_t data() const { return ring + stage * T::kStageBytes; }
  QK_DEVICE uint32_t full() const { return ring + T::kRing + stage * 8; }
  QK_DEVICE uint32_t empty() const { return full() + T::kStages * 8; }
  QK_DEVICE void advance() {
    if (++stage == T::kStages) stage = 0, parity ^= 1;
  }
};

struct RowsAsTheyAre {
  QK_DEVICE int64_t output_row(int64_t m) const { return m; }
};

template <class T>
QK_DEVICE void fill_ring(const IgemmCudaArgs& args, const TensorMap& a, const TensorMap& w,
                         uint32_t ring) {
  RingPlace<T> place(ring);
  const int steps = static_cast<int>((args.k + T::kDepth - 1) / T::kDepth);
  for (int tile = static_cast<int>(blockIdx.x); tile < args.tiles_m * args.tiles_n;
       tile += static_cast<int>(gridDim.x)) {
    const Place at = place_of_tile<T>(args, tile);
    for (int step = 0; step < steps; ++step, place.advance()) {
      barrier_wait(place.empty(), place.parity ^ 1);
      barrier_arrive_expecting(place.full(), T::kStageBytes);
      copy_box(place.data(), a, step * T::kDepth, at.row, place.full());
      copy_box(place.data() + T::kABytes, w, step * T::kDepth, at.column, place.full());
    }
  }
}

template <class T, bool kSigned>
QK_DEVICE void multiply(const IgemmCudaArgs& args, uint32_t ring) {
  RingPlace<T> place(ring);
  const WarpPlace<T> w;
  const uint32_t my_rows = threadIdx.x / kWarpgroupThreads * (64 * T::kDepth);
  const int steps = static_cast<int>((args.k + T::kDepth - 1) / T::kDepth);
  for (int tile = static_cast<int>(blockIdx.x); tile < args.tiles_m * args.tiles_n;
       tile += static_cast<int>(gridDim.x)) {
    Sums<T> sums;
    uint32_t last_empty = 0;
    for (int step = 0; step < steps; ++step, place.advance()) {
      barrier_wait(place.full(), place.parity);
      const uint64_t a = box_descriptor(place.data() + my_rows);
      const uint64_t b = box_descriptor(place.data() + T::kABytes);
      wgmma_fence();
#pragma unroll
      for (int slice = 0; slice < T::kDepth / 32; ++slice) {
        wgmma_m64n128k32<kSigned>(sums.acc[0], a + slice * 2, b + slice * 2);
      }
      wgmma_commit();
      wgmma_wait<1>();  // the step before has read its stage
      if (step > 0 && w.lane == 0) barrier_arrive(last_empty);
      last_empty = place.empty();
    }
    wgmma_wait<0>();
    if (w.lane == 0) barrier_arrive(last_empty);
    const Place at = place_of_tile<T>(args, tile);
    switch (args.output) {
      case OutputType::kU8:
      case OutputType::kS8:
        store_sums<T, 1>(args, RowsAsTheyAre{}, w, at, sums);
        break;
      case OutputType::kBF16:
      case OutputType::kF16:
        store_sums<T, 2>(args, RowsAsTheyAre{}, w, at, sums);
        break;
      case OutputType::kS32:
      case OutputType::kF32:
        store_sums<T, 4>(args, RowsAsTheyAre{}, w, at, sums);
        break;
    }
  }
}

template <class T, bool kSigned>
__global__ void __launch_bounds__(T::kBlockThreads, 1)
    wgmma_kernel(const __grid_constant__ IgemmCudaArgs args, const __grid_constant__ TensorMap a,
                 const __grid_constant__ TensorMap w) {
  const uint32_t ring = (shared_memory() + kPatches + kBoxAlign - 1) / kBoxAlign * kBoxAlign;
  if (threadIdx.x == 0) {
    RingPlace<T> place(ring);
    for (int stage = 0; stage < T::kStages; ++stage, place.advance()) {
      barrier_init(place.full(), 1);
      barrier_init(place.empty(), T::kThreads / kWarpSize);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x < T::kThreads) {
    multiply<T, kSigned>(args, ring);
  } else if (threadIdx.x == T::kThreads) {
    fill_ring<T>(args, a, w, ring);
  }
}

}  // namespace

cudaError_t launch_linear_wgmma(const IgemmCudaArgs& args, const RowSource& source,
                                bool input_signed, int blocks, cudaStream_t stream) {
  using T = WgmmaTile;
  const auto kernel = input_signed ? wgmma_kernel<T, true> : wgmma_kernel<T, false>;
  TensorMap a, w;
  // Before the maps: the driver makes them in the context of this thread, which has none before its
  // first call of the runtime.
  cudaError_t error = allow_shared_memory(kernel, kSharedBytes);
  if (error == cudaSuccess) {
    error = make_tensor_map(&a, source.input, source.depth, args.m, source.row_stride, T::kRows);
  }
  if (error == cudaSuccess) {
    error = make_tensor_map(&w, args.weight, args.k, args.n, args.k, T::kColumns);
  }
  if (error != cudaSuccess) return error;
  const int64_t tiles = int64_t{args.tiles_m} * args.tiles_n;
  return launch(kernel, static_cast<unsigned>(tiles < blocks ? tiles : blocks), T::kBlockThreads,
                kSharedBytes, stream, args, a, w);
}

}  // namespace qk::cuda
