// What Hopper (compute capability 9.0) adds to cuda.cuh: barriers in shared memory, boxes of a
// matrix that the tensor memory accelerator (TMA) copies, and matrix products of a warpgroup that
// read shared memory themselves (wgmma). For files that are compiled for sm_90a alone, and for the
// emulator.
//
// A box is 128 bytes wide and lies in shared memory row by row, at a multiple of 1024 bytes; the 16
// byte chunks of row r are exclusive-ored with r % 8 ("128-byte swizzle"), by the copy and by the
// product alike.
#pragma once

#include "csrc/base/cuda.cuh"
#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace qk::cuda {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr uint32_t kBoxBytes = 128;   // the width of a box
inline constexpr uint32_t kBoxAlign = 1024;  // where it begins in shared memory

// Where the 16-byte chunks of 8 rows of a box lie, for wgmma: the address in units of 16 bytes; 8
// rows are 1024 bytes; swizzle of 128 bytes. 32 bytes of K further is 2 more.
QK_DEVICE uint64_t box_descriptor(uint32_t address) {
  return (address >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{kBoxAlign >> 4} << 32 |
         uint64_t{1} << 62;
}

#if defined(__CUDACC__)

using TensorMap = CUtensorMap;

// A matrix of bytes of which boxes of kBoxBytes by `box_rows` are copied; what lies outside is
// zero. `matrix` and `row_bytes` are multiples of 16. The function of the driver is looked up at
// run time: nothing is linked to libcuda. The calling thread must have a current context.
inline cudaError_t make_tensor_map(TensorMap* map, const void* matrix, int64_t depth, int64_t rows,
                                   int64_t row_bytes, int box_rows) {
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorCallRequiresNewerDriver;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {kBoxBytes, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// `arrivals` end a phase of the barrier, with the bytes that were announced.
QK_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the last barrier_init, and before the __syncthreads that lets others use the barriers.
QK_DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
QK_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces bytes that boxes will bring.
QK_DEVICE void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Until the phase with this parity has ended: the first has parity 0. Of a new barrier, the phase
// with parity 1 counts as ended.
QK_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// The box at byte `column` of row `row`, to `to`; `barrier` hears of its bytes, those beyond the
// matrix too.
QK_DEVICE void copy_box(uint32_t to, const TensorMap& map, int32_t column, int32_t row,
                        uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// Registers that a product will read or write are settled before it starts.
QK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
QK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups of this warp are on their way.
template <int kPending>
QK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// sums[64 x 128] += a[64 x 32] * b[32 x 128], A and B^T being rows of boxes. Warp w of the group
// has rows 16w.. of the sums, and lane l of column block j the elements of mma_m16n8k32.
template <bool kASigned>
QK_DEVICE void wgmma_m64n128k32(int32_t (&sums)[16][4], uint64_t a, uint64_t b) {
#define QK_FOUR(j) "+r"(sums[j][0]), "+r"(sums[j][1]), "+r"(sums[j][2]), "+r"(sums[j][3])
#define QK_WGMMA(type)                                                                           \
  asm volatile(                                                                                  \
      "wgmma.mma_async.sync.aligned.m64n128k32.s32." type                                        \
      ".s8 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"  \
      "%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44," \
      "%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, " \
      "1;"                                                                                       \
      : QK_FOUR(0), QK_FOUR(1), QK_FOUR(2), QK_FOUR(3), QK_FOUR(4), QK_FOUR(5), QK_FOUR(6),      \
        QK_FOUR(7), QK_FOUR(8), QK_FOUR(9), QK_FOUR(10), QK_FOUR(11), QK_FOUR(12), QK_FOUR(13),  \
        QK_FOUR(14), QK_FOUR(15)                                                                 \
      : "l"(a), "l"(b))
  if constexpr (kASigned) {
    QK_WGMMA("s8");
  } else {
    QK_WGMMA("u8");
  }
#undef QK_WGMMA
#undef QK_FOUR
}

#else  // the emulator

using TensorMap = simt::TensorMap;

inline cudaError_t make_tensor_map(TensorMap* map, const void* matrix, int64_t depth, int64_t rows,
                                   int64_t row_bytes, int box_rows) {
  return simt::encode_tensor_map(map, matrix, depth, rows, row_bytes, box_rows)
             ? cudaSuccess
             : cudaErrorInvalidValue;
}
inline void barrier_init(uint32_t barrier, int arrivals) { simt::barrier_init(barrier, arrivals); }
inline void barrier_init_done() { simt::barrier_init_done(); }
inline void barrier_arrive(uint32_t barrier) { simt::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  simt::barrier_arrive(barrier, bytes);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) { simt::barrier_wait(barrier, parity); }
inline void copy_box(uint32_t to, const TensorMap& map, int32_t column, int32_t row,
                     uint32_t barrier) {
  simt::start_box(to, map, column, row, barrier);
}
inline void wgmma_fence() { simt::wgmma_fence(); }
inline void wgmma_commit() { simt::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  simt::wgmma_wait(kPending);
}
template <bool kASigned>
void wgmma_m64n128k32(int32_t (&sums)[16][4], uint64_t a, uint64_t b) {
  simt::wgmma<kASigned>(&sums[0][0], 128, a, b);
}

#endif

}  // namespace qk::cuda
