// Weights of linear and convolution steps, packed for one instruction set.
#pragma once

#include "csrc/base/cpu.h"
#include "csrc/plan/memory.h"
#include "csrc/plan/model.h"

namespace qk::plan {

// Packs the weights of a linear or convolution step. kUnsupported: the accumulator could overflow,
// or a product of scales leaves the float32 range.
Error pack_weights(const Model& model, const Step& step, Isa isa, Block* packed);

}  // namespace qk::plan
