// What a csrc function reports to its caller. csrc neither throws nor aborts nor prints; the seam
// turns a failed status into a Python error.
#pragma once

namespace qk {

enum class Status {
  kOk = 0,
  kBadMagic,    // a packed buffer that qkernels did not write
  kBadVersion,  // a packed buffer of another version of qkernels
  kBadIsa,      // a packed buffer for an instruction set that is not active
  kBadShape,    // a packed buffer that does not fit the operands
  kBadScale,    // a product of scales, or a bias divided by it, leaves the float32 range
  kKTooLarge,   // the int32 accumulator could overflow
};

}  // namespace qk
