// The device functions that csrc's kernels stand on: instructions that C++ has no words for, and
// the launch. Two builds: nvcc makes PTX of them; where the compiler is not nvcc, the kernels run
// on the emulator of tests/simt, whose <cuda_runtime.h> comes first on the include path.
//
// Shared memory is reached through these functions only, by address: so the emulator sees every
// access and can look for races, unwritten bytes and bank conflicts.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define QK_DEVICE __device__ __forceinline__
#else
#define QK_DEVICE inline
#endif

namespace qk::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// kCount elements that are loaded and stored by one instruction: at most 16 bytes.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T v[kCount];
};

// The product and the copy that Turing has, below.
template <bool kASigned>
QK_DEVICE void mma_m8n8k16(int32_t& sum0, int32_t& sum1, uint32_t a, uint32_t b);
QK_DEVICE void shared_store_u128(uint32_t address, uint4 v);

// mma_m16n8k32 out of four smaller products: the fragments are theirs, side by side.
template <bool kASigned>
QK_DEVICE void mma_m16n8k32_by_parts(int32_t (&sums)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mma_m8n8k16<kASigned>(sums[i % 2 * 2], sums[i % 2 * 2 + 1], a[i], b[i / 2]);
  }
}

// `count` of 16 bytes, zeros behind them.
QK_DEVICE void copy_16(uint32_t to, const void* from, int count);

#if defined(__CUDACC__)

// The address of the kernel's dynamic shared memory, aligned to 128 bytes.
QK_DEVICE uint32_t shared_memory() {
  extern __shared__ __align__(128) uint8_t qk_shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(qk_shared_memory));
}

QK_DEVICE uint32_t shared_load_u8(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
QK_DEVICE uint32_t shared_load_u32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
QK_DEVICE uint4 shared_load_u128(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
QK_DEVICE void shared_store_u16(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(v)) : "memory");
}
QK_DEVICE void shared_store_u32(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
QK_DEVICE void shared_store_u64(uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
QK_DEVICE void shared_store_u128(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Adds one. Any number of threads may count at an address between two barriers.
QK_DEVICE void shared_count(uint32_t address) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address) : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define QK_TURING 1
#endif

// cp.async: `count` of 16 bytes are copied, the rest is zero. `from` is aligned to 16. Turing has
// no such instruction: it copies at once.
QK_DEVICE void copy_async_16(uint32_t to, const void* from, int count) {
#if defined(QK_TURING)
  copy_16(to, from, count);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(count)
               : "memory");
#endif
}
QK_DEVICE void commit_copies() {
#if !defined(QK_TURING)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most kPending groups of this thread are on their way. Others see them after a barrier.
template <int kPending>
QK_DEVICE void wait_copies() {
#if !defined(QK_TURING)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

template <bool kASigned>
QK_DEVICE void mma_m8n8k16(int32_t& sum0, int32_t& sum1, uint32_t a, uint32_t b) {
  if constexpr (kASigned) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(sum0), "+r"(sum1)
                 : "r"(a), "r"(b));
  } else {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(sum0), "+r"(sum1)
                 : "r"(a), "r"(b));
  }
}

QK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// sums[16x8] += a[16x32] * b[32x8]. Lane l holds of A the bytes 4*(l%4).. of rows l/4 and l/4+8, in
// the first and the last 16 columns: a[0] = row l/4, a[1] = row l/4+8, a[2], a[3] likewise 16 bytes
// on; of B column l/4 alike; sums[i] is row l/4 + 8*(i/2), column 2*(l%4) + i%2.
template <bool kASigned>
QK_DEVICE void mma_m16n8k32(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(QK_TURING)
  mma_m16n8k32_by_parts<kASigned>(sums, a, b);
#else
  if constexpr (kASigned) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// sum + the dot product of 4 bytes of a, signed or not, with 4 signed bytes of b.
template <bool kASigned>
QK_DEVICE int32_t dot4(int32_t sum, uint32_t a, uint32_t b) {
  int32_t r;
  if constexpr (kASigned) {
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sum));
  } else {
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sum));
  }
  return r;
}

// Of data that nobody writes during the launch.
QK_DEVICE uint4 load_16(const void* from) { return __ldg(static_cast<const uint4*>(from)); }
// The kCount elements at `from`, which is aligned to all of them.
template <int kCount, typename T>
QK_DEVICE Vector<T, kCount> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}
template <typename T, int kCount>
QK_DEVICE void store_vector(T* to, const Vector<T, kCount>& v) {
  if constexpr (sizeof(v) == 16) {  // left to itself, the compiler may store element by element
    uint4 word;
    memcpy(&word, &v, 16);
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(word.x), "r"(word.y),
                 "r"(word.z), "r"(word.w)
                 : "memory");
  } else {
    *reinterpret_cast<Vector<T, kCount>*>(to) = v;
  }
}
// Past L1: for data that is read once.
QK_DEVICE uint4 load_16_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
// From L2: what another block of the same launch has stored.
QK_DEVICE uint4 load_16_shared_by_blocks(const void* from) {
  return __ldcg(static_cast<const uint4*>(from));
}
QK_DEVICE void store_16(void* to, uint4 v) { *static_cast<uint4*>(to) = v; }

// Lets a kernel use more than the default 48 KiB of shared memory.
template <typename... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes <= (48 << 10)) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (const cudaError_t error = allow_shared_memory(kernel, shared_bytes); error != cudaSuccess) {
    return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

#else  // the emulator

inline uint32_t shared_memory() { return 0; }
inline uint32_t shared_load_u8(uint32_t address) { return simt::shared_load<uint8_t>(address); }
inline uint32_t shared_load_u32(uint32_t address) { return simt::shared_load<uint32_t>(address); }
inline uint4 shared_load_u128(uint32_t address) { return simt::shared_load<uint4>(address); }
inline void shared_store_u16(uint32_t address, uint32_t v) {
  simt::shared_store(address, static_cast<uint16_t>(v));
}
inline void shared_store_u32(uint32_t address, uint32_t v) { simt::shared_store(address, v); }
inline void shared_store_u64(uint32_t address, uint2 v) { simt::shared_store(address, v); }
inline void shared_store_u128(uint32_t address, uint4 v) { simt::shared_store(address, v); }
inline void shared_count(uint32_t address) { simt::shared_count(address); }
// Which instructions there are: as __CUDA_ARCH__ says when nvcc compiles.
inline bool is_turing() { return simt::device.major < 8; }
inline void copy_async_16(uint32_t to, const void* from, int count) {
  if (is_turing()) return copy_16(to, from, count);
  simt::copy_async(to, from, count);
}
inline void commit_copies() { simt::commit_copies(); }
template <int kPending>
void wait_copies() {
  simt::wait_copies(kPending);
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { simt::ldmatrix_x4(r, address); }
template <bool kASigned>
void mma_m8n8k16(int32_t& sum0, int32_t& sum1, uint32_t a, uint32_t b) {
  simt::mma_m8n8k16<kASigned>(&sum0, &sum1, a, b);
}
template <bool kASigned>
void mma_m16n8k32(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if (is_turing()) return mma_m16n8k32_by_parts<kASigned>(sums, a, b);
  simt::mma_m16n8k32<kASigned>(sums, a, b);
}
template <bool kASigned>
int32_t dot4(int32_t sum, uint32_t a, uint32_t b) {
  uint32_t r = static_cast<uint32_t>(sum);
  for (int i = 0; i < 32; i += 8) {
    const auto byte = static_cast<uint8_t>(a >> i);
    const int32_t value = kASigned ? static_cast<int8_t>(byte) : byte;
    r += static_cast<uint32_t>(value * static_cast<int8_t>(static_cast<uint8_t>(b >> i)));
  }
  return static_cast<int32_t>(r);
}
inline uint4 load_16(const void* from) { return simt::global_load<uint4>(from); }
template <int kCount, typename T>
Vector<T, kCount> load_vector(const T* from) {
  return simt::global_load<Vector<T, kCount> >(from);
}
template <typename T, int kCount>
void store_vector(T* to, const Vector<T, kCount>& v) {
  simt::global_store(to, v);
}
inline uint4 load_16_once(const void* from) { return simt::global_load<uint4>(from); }
inline uint4 load_16_shared_by_blocks(const void* from) { return simt::global_load<uint4>(from); }
inline void store_16(void* to, uint4 v) { simt::global_store(to, v); }

template <typename... Parameters>
cudaError_t allow_shared_memory(void (*)(Parameters...), size_t) {
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, const Arguments&... arguments) {
  simt::launch(grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}

#endif

// `count` bytes from anywhere, zeros behind them.
QK_DEVICE uint4 gather_16(const uint8_t* from, int count) {
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < count) word[i / 4] |= uint32_t{from[i]} << (i % 4 * 8);
  }
  return {word[0], word[1], word[2], word[3]};
}

QK_DEVICE void copy_16(uint32_t to, const void* from, int count) {
  shared_store_u128(
      to, count == 16 ? load_16(from) : gather_16(static_cast<const uint8_t*>(from), count));
}

}  // namespace qk::cuda
