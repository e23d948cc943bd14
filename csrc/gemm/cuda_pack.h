// The weights of a CUDA GEMM: canonical rows, and beside them what the epilogue needs.
//
// Layout: one block of bytes, every part aligned to 64:
//   Epilogue; init, weight zero points, addend, mult ([columns] each, see cuda_columns); 64 bytes
//   of the input zero point, which padding reads; the weight [n][taps][depth rounded up to 16],
//   zero behind `depth`; zeros to a multiple of kCudaPage; then as many more bytes as
//   64 * fingerprint of the layer + code of CudaPackedFacts says.
// Memory: made on the host, then copied to the device as it is.
// Trick: a launch must not read the device, so what it has to know and to check (sizes, output
//   type, signedness, residual) is in the length of the block.
#pragma once

#include "csrc/gemm/igemm.h"

namespace qk {

inline constexpr int64_t kCudaChunk = 16;  // bytes of A and B that are fetched at once

struct CudaPackedFacts {
  OutputType output = OutputType::kU8;
  bool input_signed = false, weight_zero_points = false, residual = false;

  int64_t code() const {
    return static_cast<int64_t>(output) | input_signed << 3 | weight_zero_points << 4 |
           residual << 5;
  }
};

// The [n] terms of the columns, with room behind the last for whole tiles to read.
inline constexpr int64_t kCudaColumnSlack = 256;
constexpr int64_t cuda_columns(int64_t n) { return (n + 15) / 16 * 16 + kCudaColumnSlack; }
constexpr int64_t cuda_depth(int64_t depth) {
  return (depth + kCudaChunk - 1) / kCudaChunk * kCudaChunk;
}

struct CudaPackedLayout {
  int64_t init, zero_point, addend, mult, padding, weight;  // offsets in bytes
  int64_t row_bytes;                                        // of the weight
  int64_t bytes;                                            // to the end of the weight
};
CudaPackedLayout cuda_packed_layout(int64_t n, int64_t taps, int64_t depth);

// Tells layers apart whose blocks are as long: a number below 64. Two that differ in n alone or in
// depth alone never have the same where they differ by less than 59, or where both are multiples of
// 16 and differ by less than 1024. `geometry`: a hash of what else a layer has, 0 of a linear one.
constexpr int64_t cuda_fingerprint(int64_t n, int64_t depth, uint64_t geometry) {
  const auto spread = [](int64_t size) { return static_cast<uint64_t>(size + size / 64 * 5); };
  const uint64_t mixed = geometry * 0x9e3779b97f4a7c15u >> 58;
  return static_cast<int64_t>((mixed + 9 * spread(n) + spread(depth)) % 64);
}

// All fingerprints and codes fit into one.
inline constexpr int64_t kCudaPage = 64 * kPackedAlign;
// `bytes` is what the layouts of a block add up to.
int64_t cuda_packed_length(int64_t bytes, int64_t fingerprint, const CudaPackedFacts& facts);
// kBadShape if no facts give this length.
Status facts_of_length(int64_t length, int64_t bytes, int64_t fingerprint, CudaPackedFacts* facts);

CudaPackedFacts cuda_packed_facts(const PackSource& source);
int64_t packed_cuda_bytes(int64_t n, int64_t taps, int64_t depth, const CudaPackedFacts& facts);
// kKTooLarge and kBadScale as pack_igemm.
Status pack_igemm_cuda(const PackSource& source, void* dst);
// kBadShape if `length` is not that of a block of these sizes.
Status read_cuda_facts(int64_t length, int64_t n, int64_t taps, int64_t depth,
                       CudaPackedFacts* facts);

}  // namespace qk
