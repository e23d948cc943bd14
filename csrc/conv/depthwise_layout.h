// How depthwise weights lie: what packing writes and the driver of the kernels reads.
#pragma once

#include "csrc/base/integers.h"
#include "csrc/conv/depthwise.h"

namespace qk {

// The channel at `position` of a block of `chunks` times 16 channels. In a block of one chunk
// positions are channels. In wider ones the byte unpacks work in lanes of 16 bytes: quad u (0..3)
// of all lanes comes before quad u + 1.
constexpr int64_t channel_at(int64_t chunks, int64_t position) {
  const int64_t quad = position / 4, t = position % 4;
  return 16 * (quad % chunks) + 4 * (quad / chunks) + t;
}

// The vectors of an ISA.
struct DepthwiseLayout {
  int64_t lanes, most_vectors;
  // int16 instead of bytes: a dword of the scratch is two rows of a channel; a vector of narrow
  // groups has channels 0 and 2 of each quad first, then 1 and 3, its weights too.
  bool words;
  bool holds_taps;  // three taps beside each other are read in the order of the scratch

  int64_t block_channels() const { return lanes * most_vectors; }
  // Vectors for `channels` left: the fewest of 1, 2, 4 (times 16 channels) that hold them.
  int64_t vectors(int64_t channels) const {
    int64_t v = most_vectors;
    while (v > 1 && lanes * v / 2 >= channels && lanes * v / 2 >= 16) v /= 2;
    return v;
  }
  int64_t chunks(int64_t vectors) const { return vectors * lanes / 16; }
  // Input rows of a channel in a dword.
  int64_t dword_rows() const { return words ? 2 : 4; }
  // Of a vector in the scratch, and of its weights.
  int64_t vector_bytes(const DepthwisePlan& plan) const {
    return lanes * (words && plan.quads > 0 ? 8 : 4);
  }
  // Of a column of the scratch strip.
  int64_t column_bytes(const DepthwisePlan& plan) const {
    return plan.row_groups * most_vectors * vector_bytes(plan);
  }
};

inline DepthwiseLayout layout_of(Isa isa) {
  switch (isa) {
    case Isa::kAmx:  // has nothing to offer to a sum of one channel
    case Isa::kAvx512Vnni:
      return {16, 4, false, true};
    case Isa::kAvxVnni:
      return {8, 4, false, true};
    case Isa::kAvx2:
      return {8, 4, true, true};
    case Isa::kScalar:
      break;
  }
  return {16, 1, false, false};
}

DepthwisePlan depthwise_plan(const ConvShape& shape, const ConvPhase& phase,
                             const DepthwiseLayout& layout);

// At the start of a packed part; then for each block init, addend, mult and weights.
struct alignas(64) DepthwisePart {
  int64_t block_bytes;
  int64_t raw;  // the fast 8-bit epilogue does not apply
  Epilogue epilogue;
};

// init, addend, mult and order.
inline int64_t parameter_bytes(const DepthwiseLayout& layout, const DepthwisePlan& plan) {
  return align_up((3 + plan.quads) * layout.block_channels() * 4);
}

}  // namespace qk
