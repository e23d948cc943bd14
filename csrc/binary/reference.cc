// Normative: a word of each output channel at a time.
#include "csrc/binary/binary.h"

namespace qk {

void xnor_scalar(const BinarySegment* segments, int64_t count, const uint64_t* weight,
                 int32_t* ones) {
  for (int64_t c = 0; c < kBinaryBlock; ++c) ones[c] = 0;
  for (int64_t s = 0; s < count; ++s) {
    const uint64_t* w = weight + segments[s].first * kBinaryBlock;
    for (int64_t k = 0; k < segments[s].words; ++k, w += kBinaryBlock) {
      for (int64_t c = 0; c < kBinaryBlock; ++c) {
        ones[c] += __builtin_popcountll(segments[s].input[k] ^ w[c]);
      }
    }
  }
}

}  // namespace qk
