// A product whose codes become floats at once: what igemm and then dequantize would give.
//
//   out[r, n] = float(code[r, n] - zero_point) * scale
//
// Memory: the codes go through a scratch of the caller, small enough to stay in the cache.
#pragma once

#include "csrc/gemm/igemm.h"
#include "csrc/quantize/quantize.h"

namespace qk {

struct DequantizedOutput {
  const float* scale = nullptr;  // nullptr: the output stays codes
  const int32_t* zero_point = nullptr;
  bool stream = false;  // stores past the caches
};

// Bytes from one element of the output to the next.
inline int64_t stored_bytes(const Epilogue& epilogue, const DequantizedOutput& floats) {
  return floats.scale != nullptr ? 4 : output_bytes(epilogue.output);
}

// `args.out` is float32, its strides and offsets too. `codes`: a byte for each output.
void igemm_dequantized(const IgemmArgs& args, const DequantizedOutput& floats, uint8_t* codes);

}  // namespace qk
