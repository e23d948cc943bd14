// One tile of an int8 GEMM on tensor cores: the loop over K that linear and convolution share, and
// the epilogue.
//
//   acc[m, n] = sum over k of A[m, k] * W[n, k] + init[n] - zw[n] * sum over k of A[m, k]   int32
//
// Layout: A and W lie row by row with K contiguous. A stage of the ring holds kDepth bytes of kRows
//   rows of A and kColumns rows of W, in chunks of 16 bytes whose place in the row is
//   exclusive-ored with the row number: neither the copies nor ldmatrix meet a bank twice. Where A
//   comes from is the Loader's business.
// Numbers: int32 sums that wrap, in any order the same: also over the parts of a split K. The
//   epilogue is that of epilogue.h, to the bit.
// Tricks: copies run kStages - 1 steps ahead (cp.async), one barrier a step. A split writes its
// sums
//   as they lie in registers; the last block to arrive adds them up and goes on to the epilogue.
//   The epilogue passes through shared memory so that results leave as 16-byte stores.
#pragma once

#include "csrc/base/cuda.cuh"
#include "csrc/base/dtype.h"
#include "csrc/gemm/cuda.h"
#include "csrc/gemm/cuda_plan.h"

namespace qk::cuda {

template <int kIndex>
struct Tile {
  static constexpr CudaTile kShape = kCudaTiles[kIndex];
  static constexpr int kRows = kShape.rows, kColumns = kShape.columns, kDepth = kShape.depth;
  static constexpr int kStages = kShape.stages, kThreads = kShape.threads();
  static constexpr int kWarpRows = kShape.warp_rows, kWarpColumns = kShape.warp_columns;
  static constexpr bool kNeedsAsyncCopies = kShape.needs_async_copies();
  static constexpr int kChunks = kDepth / 16;          // of a row in a stage
  static constexpr int kRowStep = kThreads / kChunks;  // rows that one pass of copies covers
  static constexpr int kMmaRows = kWarpRows / 16, kMmaColumns = kWarpColumns / 8;
  static constexpr int kSums = kMmaRows * kMmaColumns * 4;  // of a thread
  static constexpr uint32_t kABytes = kRows * kDepth, kStageBytes = (kRows + kColumns) * kDepth;
  static_assert(kRowStep % 8 == 0 && kRows % kRowStep == 0 && kColumns % kRowStep == 0);

  // The exclusive-or of the chunks of a row: 8 rows that ldmatrix reads lie in 8 different places.
  QK_DEVICE static uint32_t twist(uint32_t row) { return kDepth == 64 ? row / 2 % 4 : row % 8; }
};

QK_DEVICE int clamp_count(int64_t left) {
  return left <= 0 ? 0 : left >= kCudaChunk ? static_cast<int>(kCudaChunk) : static_cast<int>(left);
}

// Copies a thread's chunks of kCount rows of a matrix, `row_bytes` apart and aligned to 16.
template <class T, int kCount>
class RowCopies {
 public:
  QK_DEVICE RowCopies(const uint8_t* matrix, int64_t row_bytes, int64_t depth, int64_t first_row,
                      int64_t rows)
      : matrix_(matrix),
        step_(row_bytes * T::kRowStep),
        depth_(depth),
        chunk_(threadIdx.x % T::kChunks) {
    const uint32_t row = threadIdx.x / T::kChunks;
    mine_ = matrix + (first_row + row) * row_bytes + chunk_ * 16;
    left_ = static_cast<int>(rows - first_row < kCount ? rows - first_row : kCount) -
            static_cast<int>(row);
    to_ = row * T::kDepth + (chunk_ ^ T::twist(row)) * 16;
  }

  QK_DEVICE void copy(uint32_t stage, int step) const {
    const int64_t k = int64_t{step} * T::kDepth;
    const int count = clamp_count(depth_ - k - chunk_ * 16);
#pragma unroll
    for (int i = 0; i < kCount / T::kRowStep; ++i) {
      const int n = i * T::kRowStep < left_ ? count : 0;
      copy_async_16(stage + to_ + i * T::kRowStep * T::kDepth,
                    n > 0 ? mine_ + i * step_ + k : matrix_, n);
    }
  }

 private:
  const uint8_t* matrix_;
  const uint8_t* mine_;
  int64_t step_, depth_;
  uint32_t chunk_, to_;
  int left_;
};

// The place of a block in the grid: along M in groups of 8, so that blocks that run together share
// rows of W in L2.
struct Place {
  int32_t row, column;  // rows and columns are fewer than 2^31
  int split;
};

// Computed where they are needed: registers are short in the loop.
QK_DEVICE int64_t end_column(const IgemmCudaArgs& args) {
  return (int64_t{blockIdx.z} + 1) * args.group_columns;
}
QK_DEVICE int64_t tile_number(const IgemmCudaArgs& args) {
  return int64_t{blockIdx.z} * args.tiles_m * args.tiles_n + blockIdx.x;
}

template <class T>
QK_DEVICE Place place_of_tile(const IgemmCudaArgs& args, int tile) {
  constexpr int kGroup = 8;
  const int group = tile / (kGroup * args.tiles_n), within = tile % (kGroup * args.tiles_n);
  const int rest = args.tiles_m - group * kGroup, height = rest < kGroup ? rest : kGroup;
  return {(group * kGroup + within % height) * T::kRows,
          static_cast<int32_t>(blockIdx.z * static_cast<uint32_t>(args.group_columns)) +
              within / height * T::kColumns,
          static_cast<int>(blockIdx.y)};
}
template <class T>
QK_DEVICE Place place_of(const IgemmCudaArgs& args) {
  return place_of_tile<T>(args, static_cast<int>(blockIdx.x));
}

template <class T>
struct WarpPlace {
  uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint32_t row = warp % (T::kRows / T::kWarpRows) * T::kWarpRows;
  uint32_t column = warp / (T::kRows / T::kWarpRows) * T::kWarpColumns;
};

template <class T>
struct Fragments {
  uint32_t a[T::kMmaRows][4], b[T::kMmaColumns][2];

  // 32 bytes of K: `slice` of the stage.
  QK_DEVICE void load(uint32_t stage, const WarpPlace<T>& w, int slice) {
    const uint32_t row = w.lane % 16, a_chunk = slice * 2 + w.lane / 16;
    const uint32_t from_a = stage + (w.row + row) * T::kDepth + (a_chunk ^ T::twist(row)) * 16;
#pragma unroll
    for (int i = 0; i < T::kMmaRows; ++i) ldmatrix_x4(a[i], from_a + i * 16 * T::kDepth);
    const uint32_t column = w.lane % 8 + w.lane / 16 * 8, b_chunk = slice * 2 + w.lane / 8 % 2;
    const uint32_t from_b =
        stage + T::kABytes + (w.column + column) * T::kDepth + (b_chunk ^ T::twist(column)) * 16;
#pragma unroll
    for (int j = 0; j < T::kMmaColumns / 2; ++j) {
      uint32_t r[4];
      ldmatrix_x4(r, from_b + j * 16 * T::kDepth);
      b[2 * j][0] = r[0], b[2 * j][1] = r[1];
      b[2 * j + 1][0] = r[2], b[2 * j + 1][1] = r[3];
    }
  }
};

template <class T>
struct Sums {
  int32_t acc[T::kMmaRows][T::kMmaColumns][4] = {};
};

QK_DEVICE int32_t wrapping_add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
QK_DEVICE int32_t wrapping_multiply(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
}

// Takes zw[n] * rowsum[m] off the sums. A row's bytes are spread over the 4 lanes of a quad.
template <class T>
QK_DEVICE void subtract_row_sums(const IgemmCudaArgs& args, const WarpPlace<T>& w,
                                 int64_t first_column, int32_t (&row_sums)[T::kMmaRows][2],
                                 Sums<T>* sums) {
  if (args.zero_point == nullptr) return;
#pragma unroll
  for (int i = 0; i < T::kMmaRows; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int32_t sum = row_sums[i][h];
      sum = wrapping_add(sum, __shfl_xor_sync(kAllLanes, sum, 1));
      row_sums[i][h] = wrapping_add(sum, __shfl_xor_sync(kAllLanes, sum, 2));
    }
#pragma unroll
    for (int j = 0; j < T::kMmaColumns; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int64_t n = first_column + w.column + j * 8 + w.lane % 4 * 2 + v % 2;
        const int32_t correction = wrapping_multiply(row_sums[i][v / 2], args.zero_point[n]);
        sums->acc[i][j][v] = wrapping_add(sums->acc[i][j][v], -correction);
      }
    }
  }
}

// Adds up the parts of a tile; true for the one block that goes on with the whole sums.
template <class T>
QK_DEVICE bool combine_splits(const IgemmCudaArgs& args, const Place& place, Sums<T>* sums) {
  if (args.splits == 1) return true;
  uint8_t* tile = args.slices + tile_number(args) * args.splits * T::kRows * T::kColumns * 4;
  const auto slice_of = [tile](int split, int part) {
    return tile + (int64_t{split} * T::kSums / 4 + part) * T::kThreads * 16 + threadIdx.x * 16;
  };
#pragma unroll
  for (int i = 0; i < T::kMmaRows; ++i) {
#pragma unroll
    for (int j = 0; j < T::kMmaColumns; ++j) {
      const int32_t (&s)[4] = sums->acc[i][j];
      store_16(slice_of(place.split, i * T::kMmaColumns + j),
               uint4{static_cast<uint32_t>(s[0]), static_cast<uint32_t>(s[1]),
                     static_cast<uint32_t>(s[2]), static_cast<uint32_t>(s[3])});
    }
  }
  __threadfence();
  __syncthreads();
  const uint32_t ticket = shared_memory();
  if (threadIdx.x == 0) shared_store_u32(ticket, atomicAdd(args.arrived + tile_number(args), 1u));
  __syncthreads();
  const bool last = shared_load_u32(ticket) == static_cast<uint32_t>(args.splits - 1);
  __syncthreads();
  if (!last) return false;
  __threadfence();
  for (int split = 0; split < args.splits; ++split) {
    if (split == place.split) continue;
#pragma unroll
    for (int i = 0; i < T::kMmaRows; ++i) {
#pragma unroll
      for (int j = 0; j < T::kMmaColumns; ++j) {
        const uint4 v = load_16_shared_by_blocks(slice_of(split, i * T::kMmaColumns + j));
        int32_t (&s)[4] = sums->acc[i][j];
        s[0] = wrapping_add(s[0], static_cast<int32_t>(v.x));
        s[1] = wrapping_add(s[1], static_cast<int32_t>(v.y));
        s[2] = wrapping_add(s[2], static_cast<int32_t>(v.z));
        s[3] = wrapping_add(s[3], static_cast<int32_t>(v.w));
      }
    }
  }
  return true;
}

// ---- the epilogue
// --------------------------------------------------------------------------------

// Four codes and four codes of the residual, as `add` adds them.
QK_DEVICE uint32_t add_residual_word(const ResidualAdd& add, uint32_t q, bool q_signed, uint32_t r,
                                     bool r_signed) {
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < 32; i += 8) {
    const int32_t a = byte_value(static_cast<uint8_t>(q >> i), q_signed);
    const int32_t b = byte_value(static_cast<uint8_t>(r >> i), r_signed);
    sum |= uint32_t{residual_add(add, a, b)} << i;
  }
  return sum;
}

// Rows of a warp's patch in shared memory: far enough apart that the lanes of a fragment hit
// different banks.
template <class T, int kBytes>
struct Patch {
  static constexpr uint32_t kRowBytes = T::kWarpColumns * kBytes + (kBytes == 4 ? 32 : 16);
  static constexpr uint32_t kWarpBytes = 16 * kRowBytes;
  static_assert(kWarpBytes * (T::kThreads / kWarpSize) <= T::kStageBytes * T::kStages);
};

QK_DEVICE int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

// Two neighbouring outputs of row m, n, to the patch. Outputs beyond the last row and column are
// computed too, from what lies behind the columns' terms, and not stored.
template <int kBytes>
QK_DEVICE void stage_pair(const IgemmCudaArgs& args, uint32_t to, int64_t m, int64_t n,
                          int32_t acc0, int32_t acc1) {
  acc0 = wrapping_add(acc0, args.init[n]);
  acc1 = wrapping_add(acc1, args.init[n + 1]);
  if (kBytes == 4 && args.output == OutputType::kS32) {
    return shared_store_u64(to, uint2{static_cast<uint32_t>(acc0), static_cast<uint32_t>(acc1)});
  }
  if constexpr (kBytes > 1) {
    if (args.scales.row_scale != nullptr) {
      const int64_t row = at_most(m, args.m - 1);
      const float v0 = args.scales.value(acc0, row, at_most(n, args.n - 1));
      const float v1 = args.scales.value(acc1, row, at_most(n + 1, args.n - 1));
      if (kBytes == 4) return shared_store_u64(to, uint2{float_bits(v0), float_bits(v1)});
      return shared_store_u32(
          to, output_half(args.output, v0) | uint32_t{output_half(args.output, v1)} << 16);
    }
  }
  const float addend0 = args.addend[n], addend1 = args.addend[n + 1];
  const float mult0 = args.mult[n], mult1 = args.mult[n + 1];
  if (kBytes == 4) {
    shared_store_u64(to, uint2{float_bits(output_value(acc0, addend0, mult0)),
                               float_bits(output_value(acc1, addend1, mult1))});
  } else if (kBytes == 2) {
    const uint32_t low = output_half(args.output, output_value(acc0, addend0, mult0));
    const uint32_t high = output_half(args.output, output_value(acc1, addend1, mult1));
    shared_store_u32(to, low | high << 16);
  } else {
    const Epilogue& e = *args.epilogue;
    uint32_t q0 =
        static_cast<uint8_t>(requantize(acc0, addend0, mult0, e.zero_point, e.qmin, e.qmax));
    uint32_t q1 =
        static_cast<uint8_t>(requantize(acc1, addend1, mult1, e.zero_point, e.qmin, e.qmax));
    if (e.has_table) q0 = e.table[q0], q1 = e.table[q1];
    shared_store_u16(to, q0 | q1 << 8);
  }
}

// 16 rows of a warp's patch, to memory.
template <class T, int kBytes, class Rows>
QK_DEVICE void store_patch(const IgemmCudaArgs& args, const Rows& rows, uint32_t patch,
                           uint32_t lane, int64_t first_row, int64_t first_column) {
  using P = Patch<T, kBytes>;
  constexpr int kPerChunk = 16 / kBytes, kChunks = T::kWarpColumns / kPerChunk;
  const bool q_signed = args.output == OutputType::kS8;
#pragma unroll 1
  for (int i = static_cast<int>(lane); i < 16 * kChunks; i += kWarpSize) {
    const int64_t m = first_row + i / kChunks, n = first_column + i % kChunks * kPerChunk;
    if (m >= args.m || n >= end_column(args)) continue;
    const uint32_t from = patch + i / kChunks * P::kRowBytes + i % kChunks * 16;
    const int64_t row = rows.output_row(m);
    auto* to = static_cast<uint8_t*>(args.out) + row * args.out_row_bytes + n * kBytes;
    const uint8_t* residual =
        kBytes == 1 && args.residual ? args.residual + row * args.residual_row_bytes + n : nullptr;
    if (args.vector_out && end_column(args) - n >= kPerChunk) {
      uint4 v = shared_load_u128(from);
      if (residual) {
        const uint4 r = load_16(residual);
        const ResidualAdd& add = args.epilogue->residual;
        v.x = add_residual_word(add, v.x, q_signed, r.x, args.residual_signed);
        v.y = add_residual_word(add, v.y, q_signed, r.y, args.residual_signed);
        v.z = add_residual_word(add, v.z, q_signed, r.z, args.residual_signed);
        v.w = add_residual_word(add, v.w, q_signed, r.w, args.residual_signed);
      }
      store_16(to, v);
      continue;
    }
    const int left =
        end_column(args) - n < kPerChunk ? static_cast<int>(end_column(args) - n) : kPerChunk;
#pragma unroll 1
    for (int e = 0; e < left; ++e) {
      if (kBytes == 1) {
        uint32_t q = shared_load_u8(from + e);
        if (residual) {
          q = residual_add(args.epilogue->residual, byte_value(static_cast<uint8_t>(q), q_signed),
                           byte_value(residual[e], args.residual_signed));
        }
        to[e] = static_cast<uint8_t>(q);
      } else if (kBytes == 2) {
        reinterpret_cast<uint16_t*>(to)[e] =
            static_cast<uint16_t>(shared_load_u32((from + e * 2) & ~3u) >> (e % 2 * 16));
      } else {
        reinterpret_cast<uint32_t*>(to)[e] = shared_load_u32(from + e * 4);
      }
    }
  }
}

template <class T, int kBytes, class Rows>
QK_DEVICE void store_sums(const IgemmCudaArgs& args, const Rows& rows, const WarpPlace<T>& w,
                          const Place& place, const Sums<T>& sums) {
  using P = Patch<T, kBytes>;
  const uint32_t patch = shared_memory() + w.warp * P::kWarpBytes;
#pragma unroll
  for (int i = 0; i < T::kMmaRows; ++i) {
#pragma unroll
    for (int j = 0; j < T::kMmaColumns; ++j) {
      const uint32_t column = j * 8 + w.lane % 4 * 2;
      const int64_t n = place.column + w.column + column;
      const uint32_t to = patch + w.lane / 4 * P::kRowBytes + column * kBytes;
      const int32_t (&s)[4] = sums.acc[i][j];
      const int64_t m = place.row + w.row + i * 16 + w.lane / 4;
      stage_pair<kBytes>(args, to, m, n, s[0], s[1]);
      stage_pair<kBytes>(args, to + 8 * P::kRowBytes, m + 8, n, s[2], s[3]);
    }
    __syncwarp();
    store_patch<T, kBytes>(args, rows, patch, w.lane, place.row + w.row + i * 16,
                           place.column + w.column);
    __syncwarp();
  }
}

// ---- the kernel
// ----------------------------------------------------------------------------------

// A Loader is made from (its Args, first row, rows, first step) and has copy(stage, step), which
// starts or makes the copies of this thread's chunks of A, for one step after the other, and
// output_row(m).
#if defined(QK_TURING)  // left to itself, ptxas aims at more blocks than fit, and spills
#define QK_TILE_BOUNDS(threads) __launch_bounds__(threads, 1)
#else
#define QK_TILE_BOUNDS(threads) __launch_bounds__(threads)
#endif
template <class T, class Loader, bool kSigned, bool kRowSums>
__global__ void QK_TILE_BOUNDS(T::kThreads)
    igemm_kernel(const __grid_constant__ IgemmCudaArgs args,
                 const __grid_constant__ typename Loader::Args source) {
#if defined(QK_TURING)
  if constexpr (T::kNeedsAsyncCopies) return;  // never planned
#endif
  const uint32_t ring = shared_memory();
  const Place place = place_of<T>(args);
  const WarpPlace<T> w;
  const RowCopies<T, T::kColumns> b(reinterpret_cast<const uint8_t*>(args.weight), args.k, args.k,
                                    place.column, end_column(args));
  const int total = static_cast<int>((args.k + T::kDepth - 1) / T::kDepth);
  const int share = (total + args.splits - 1) / args.splits;
  const int first = place.split * share;
  const int last = first + share < total ? first + share : total;
  Loader a(source, place.row, args.m, first);

  const auto start = [&](int step) {
    if (step < last) {
      const uint32_t stage =
          ring + static_cast<uint32_t>((step - first) % T::kStages) * T::kStageBytes;
      a.copy(stage, step);
      b.copy(stage + T::kABytes, step);
    }
    commit_copies();
  };

  Sums<T> sums;
  int32_t row_sums[T::kMmaRows][2] = {};
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) start(first + s);
#pragma unroll 1
  for (int step = first; step < last; ++step) {
    wait_copies<T::kStages - 2>();
    __syncthreads();
    start(step + T::kStages - 1);
    const uint32_t stage =
        ring + static_cast<uint32_t>((step - first) % T::kStages) * T::kStageBytes;
    Fragments<T> f[2];
    f[0].load(stage, w, 0);
#pragma unroll
    for (int slice = 0; slice < T::kDepth / 32; ++slice) {
      if (slice + 1 < T::kDepth / 32) f[(slice + 1) % 2].load(stage, w, slice + 1);
      const Fragments<T>& now = f[slice % 2];
#pragma unroll
      for (int i = 0; i < T::kMmaRows; ++i) {
        if constexpr (kRowSums) {
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            row_sums[i][v % 2] = dot4<kSigned>(row_sums[i][v % 2], now.a[i][v], 0x01010101u);
          }
        }
#pragma unroll
        for (int j = 0; j < T::kMmaColumns; ++j) {
          mma_m16n8k32<kSigned>(sums.acc[i][j], now.a[i], now.b[j]);
        }
      }
    }
  }
  wait_copies<0>();
  __syncthreads();
  if constexpr (kRowSums) subtract_row_sums<T>(args, w, place.column, row_sums, &sums);
  if (!combine_splits<T>(args, place, &sums)) return;
  switch (args.output) {
    case OutputType::kU8:
    case OutputType::kS8:
      return store_sums<T, 1>(args, a, w, place, sums);
    case OutputType::kBF16:
    case OutputType::kF16:
      return store_sums<T, 2>(args, a, w, place, sums);
    case OutputType::kS32:
    case OutputType::kF32:
      return store_sums<T, 4>(args, a, w, place, sums);
  }
}

}  // namespace qk::cuda
