// Which tile a CUDA GEMM runs with and in how many parts K is cut: the cheapest by a formula, so
// that no bucket of sizes falls off a cliff. Host arithmetic only.
//
//   cycles = rounds * (steps * max(matrix cycles, L2 cycles) * residents + fixed) + split cost
//
// A round is as many blocks as the GPU holds at once; a step is one stage of the ring in K. The
// constants are those of published GPUs (int8 multiply-adds and L2 bytes per cycle of an SM).
#pragma once

#include <cstdint>
#include <string>

#include "csrc/base/integers.h"

namespace qk {

struct CudaMachine {
  int capability;  // 80 is 8.0
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;
  bool wgmma = false;  // whether the kernels of sm_90a are asked for
};

struct CudaTile {
  int rows, columns, depth;  // of a block; depth in bytes
  int stages, warp_rows, warp_columns;

  constexpr int threads() const { return rows / warp_rows * (columns / warp_columns) * 32; }
  constexpr int64_t shared_bytes() const { return int64_t{stages} * (rows + columns) * depth; }
  // Without cp.async a copy takes registers that the sums of these leave none of.
  constexpr bool needs_async_copies() const { return warp_rows * warp_columns >= 64 * 64; }
};

// Index: the number of a compiled kernel.
inline constexpr CudaTile kCudaTiles[] = {
    {128, 256, 64, 3, 64, 64}, {128, 128, 64, 4, 64, 64}, {64, 128, 64, 4, 32, 64},
    {64, 64, 64, 5, 32, 32},   {32, 64, 128, 4, 16, 32},
};
inline constexpr int kCudaTileCount = 5;
// The tile of the kernel that takes any alignment and weight zero points.
inline constexpr int kCudaGeneralTile = 3;

// The tile of the size that the kernel of sm_90a has, and the least rows that it is for.
inline constexpr int kCudaWgmmaTile = 1;
inline constexpr int64_t kCudaWgmmaRows = 65;

// What the kernels need: int8 on tensor cores.
inline constexpr int kCudaLeastCapability = 75;

// What a GPU needs for a build for `archs`: "sm_80 sm_90 compute_90" gives 80.
constexpr int least_cuda_capability(const char* archs) {
  int least = 1 << 30, number = 0;
  for (const char* at = archs;; ++at) {
    if (*at >= '0' && *at <= '9') {
      number = number * 10 + (*at - '0');
    } else if (number > 0) {
      if (number < least) least = number;
      number = 0;
    }
    if (*at == '\0') break;
  }
  return least > kCudaLeastCapability ? least : kCudaLeastCapability;
}

// Why kernels built for `archs` do not run on a GPU of that capability; empty: they do.
inline std::string why_too_old(int capability, const char* archs) {
  const int least = least_cuda_capability(archs);
  if (capability >= least) return {};
  const auto text = [](int of) { return std::to_string(of / 10) + "." + std::to_string(of % 10); };
  return "needs a GPU of compute capability " + text(least) + " or newer (built for " + archs +
         "), got " + text(capability) +
         "; build with its number in TORCH_CUDA_ARCH_LIST, or move the model to the CPU";
}

struct CudaGemmPlan {
  int tile = 0, splits = 1;
  double cycles = 0;
  int wgmma_blocks = 0;  // more than 0: the kernel of sm_90a, with at most as many blocks
};

namespace detail {

// `m` rows by `n` columns, `groups` times; k in bytes.
inline CudaGemmPlan cost_of(int index, int splits, int64_t m, int64_t n, int64_t k, int64_t groups,
                            const CudaMachine& machine) {
  constexpr double kMacsPerCycle = 2048, kL2BytesPerCycle = 48, kFixedCycles = 1500;
  const CudaTile& tile = kCudaTiles[index];
  const int64_t blocks = ceil_div(m, tile.rows) * ceil_div(n, tile.columns) * groups * splits;
  const int64_t fit = machine.shared_per_multiprocessor / (tile.shared_bytes() + 1024);
  const int64_t by_registers = 512 / tile.threads() < 1 ? 1 : 512 / tile.threads();
  int64_t residents = fit < by_registers ? fit : by_registers;
  const int64_t wanted = ceil_div(blocks, machine.multiprocessors);
  if (residents > wanted) residents = wanted;
  if (residents < 1) residents = 1;
  const double rounds = static_cast<double>(ceil_div(blocks, machine.multiprocessors * residents));
  const double steps = static_cast<double>(ceil_div(ceil_div(k, tile.depth), splits));
  const double macs = double(tile.rows) * tile.columns * tile.depth / kMacsPerCycle;
  const double bytes = double(tile.rows + tile.columns) * tile.depth / kL2BytesPerCycle;
  // A warp tile of 32 rows or columns feeds the tensor cores from shared memory less well.
  const double fragment = double(tile.warp_rows) * tile.warp_columns >= 64 * 64 ? 1.0 : 1.25;
  const double step = macs * fragment > bytes ? macs * fragment : bytes;
  const double slices =
      splits == 1 ? 0.0 : double(tile.rows) * tile.columns * 4 * (splits + 1) / kL2BytesPerCycle;
  const double store = double(tile.rows) * tile.columns / kL2BytesPerCycle;
  return {index, splits,
          rounds * ((steps * step + store) * double(residents) + kFixedCycles) + slices};
}

}  // namespace detail

// Sets of tiles that a kernel exists for: bit i is tile i.
inline constexpr unsigned kAllCudaTiles = (1u << kCudaTileCount) - 1;
inline constexpr unsigned kGeneralCudaTiles = 1u << kCudaGeneralTile;

inline CudaGemmPlan plan_cuda_gemm(int64_t m, int64_t n, int64_t k, int64_t groups,
                                   const CudaMachine& machine, unsigned tiles) {
  CudaGemmPlan best;
  for (int tile = 0; tile < kCudaTileCount; ++tile) {
    if ((tiles >> tile & 1) == 0) continue;
    if (kCudaTiles[tile].shared_bytes() > machine.shared_per_block) continue;
    if (kCudaTiles[tile].needs_async_copies() && machine.capability < 80) continue;
    const int64_t steps = ceil_div(k, kCudaTiles[tile].depth);
    for (int splits = 1; splits <= 16 && splits <= steps / 4 + 1; ++splits) {
      // No split is left without a step.
      if (splits > 1 && ceil_div(steps, splits) * (splits - 1) >= steps) continue;
      const CudaGemmPlan plan = detail::cost_of(tile, splits, m, n, k, groups, machine);
      if (best.cycles == 0 || plan.cycles < best.cycles) best = plan;
    }
  }
  return best;
}

// The int32 slices of all but the last part, and a counter a tile.
inline int64_t cuda_gemm_workspace(const CudaGemmPlan& plan, int64_t m, int64_t n, int64_t groups) {
  if (plan.splits == 1) return 0;
  const CudaTile& tile = kCudaTiles[plan.tile];
  const int64_t tiles = ceil_div(m, tile.rows) * ceil_div(n, tile.columns) * groups;
  return tiles * (int64_t{plan.splits} * tile.rows * tile.columns * 4) + (tiles * 4 + 15) / 16 * 16;
}

}  // namespace qk
