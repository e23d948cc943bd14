// Stands in for the toolkit's header where a kernel runs on the emulator: the host calls that csrc/
// makes, answered for an imaginary GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

using cudaStream_t = struct simt_stream*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};

namespace simt {
// An A100 unless a test says otherwise.
struct Device {
  int major = 8, minor = 0, multiprocessors = 108;
  int shared_per_block = 163 << 10, shared_per_multiprocessor = 164 << 10;
};
inline Device device;
}  // namespace simt

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const simt::Device& d = simt::device;
  const int answers[] = {d.major, d.minor, d.multiprocessors, d.shared_per_block,
                         d.shared_per_multiprocessor};
  *value = answers[attribute];
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
