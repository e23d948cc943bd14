// Elementwise operations on 8-bit codes.
//
//   lookup  out = table[byte of q], table of 256 codes: every unary operation and requantization
//   add     out = clamp(RNE((fma(qa, sa, -za*sa) + fma(qb, sb, -zb*sb)) * (1/so)) + zo, qmin, qmax)
//   mul     out = clamp(RNE(float((qa-za) * (qb-zb)) * ((sa*sb)/so)) + zo, qmin, qmax)
//   cat     out = the inputs one after the other along a dimension, each through its table
//
// Layout: any dense layout in memory order, or strided rows that are contiguous inside
// (csrc/base/strided.h). add and mul read a broadcast operand with stride 0, in any dimension.
// Operands and result are uint8 or int8 in any mix.
// Memory: owned by the caller; out may alias an operand of the same walk exactly, not partly.
// Numbers: bit-equal on every ISA and for every thread count; tails follow the same formula.
// Trick: the lookup table lives in registers (4 zmm or 16 xmm) and is read with byte shuffles; a
// table that is the identity is a memcpy.
#pragma once

#include <cstdint>

#include "csrc/base/cpu.h"
#include "csrc/base/parallel.h"
#include "csrc/base/strided.h"

namespace qk {

struct LookupArgs {
  const uint8_t* q;
  uint8_t* out;
  const uint8_t* table;     // [256]
  StridedLayout<2> layout;  // operands: out, q
};

enum class BinaryOp : uint8_t { kAdd, kMul };

// What add and mul need to know of the grids.
struct BinaryGrid {
  bool a_signed, b_signed, out_signed;
  float a_scale, b_scale, out_scale;
  int32_t a_zero_point, b_zero_point, out_zero_point;
  int32_t qmin, qmax;
};

struct BinaryArgs {
  BinaryOp op;
  const uint8_t* a;
  const uint8_t* b;
  uint8_t* out;
  BinaryGrid grid;
  StridedLayout<3> layout;  // operands: out, a, b; the innermost stride of a and b is 0 or 1
};

struct CatInput {
  const uint8_t* q;
  int64_t width;         // bytes of one row
  const uint8_t* table;  // [256]
};

struct CatArgs {
  const CatInput* inputs;
  int64_t count;
  uint8_t* out;  // [rows, sum of the widths]
  int64_t rows;
};

void lookup(const LookupArgs& args, const Parallel& parallel);
void binary(const BinaryArgs& args, const Parallel& parallel);
void cat(const CatArgs& args, const Parallel& parallel);

// `rows` rows of `n` bytes. A table in registers is loaded once.
struct LookupRows {
  const uint8_t* q;
  uint8_t* out;
  const uint8_t* table;
  int64_t rows, n, q_stride, out_stride;
};

// One contiguous run; an operand of one element is repeated, at most one of the two.
struct BinaryRun {
  const uint8_t* a;
  const uint8_t* b;
  uint8_t* out;
  int64_t n;
  bool a_repeats, b_repeats;
  const BinaryGrid* grid;
};

using LookupKernel = void (*)(const LookupRows&);
using BinaryKernel = void (*)(const BinaryRun&);

#define QK_LOOKUP_KERNEL(features, name) void name(const LookupRows&);
#define QK_BINARY_KERNEL(features, op, name) void name(const BinaryRun&);
#include "csrc/pointwise/kernels.inc"
#undef QK_LOOKUP_KERNEL
#undef QK_BINARY_KERNEL

LookupKernel select_lookup_kernel(CpuFeatures features = cpu_features_active());
BinaryKernel select_binary_kernel(BinaryOp op, CpuFeatures features = cpu_features_active());

}  // namespace qk
