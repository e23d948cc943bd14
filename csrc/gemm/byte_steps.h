// A layout of weights for AVX2, whose only dot product of bytes, vpmaddubsw, saturates: in an order
// in which it cannot.
//
// vpmaddubsw adds two products of u8 and s8 in int16. Over the activations 0 to 255 no such sum,
// nor one of several of them, saturates if what is positive of their weights adds up to 128 at
// most, and so what is negative. A *quad*, four activations of a row and their weights in four
// columns, is therefore
//   - taken in one of three orders of its values, which decide what is added: the rows of A are
//     kept in so many orders;
//   - split in two, each with a part of the weights, where no order will do;
//   - coupled with another quad, if their sums may be added in int16: a *double* step takes five
//     instructions for 64 products, a *single* one three for 32.
// Trained weights, whose largest are rare, need few splits and are nearly all coupled. Weights for
// which that is not so, by what packing finds, are laid out as pairs instead (x86_avx2.cc), and so
// are those of few rows: a single row takes longer with steps.
//
// Layout: N is cut into groups of four columns. The panels begin with a ByteGroup for each, behind
//   which lie the groups' records, of 2 * doubles + singles quads:
//
//     uint16 source[quads]          where a row has the quad: order * kept_quads(K) + quad
//     int8 weights[quads][4][4]     column, value; at a multiple of 32 bytes
//
// Memory: room for a third more quads than there are is reserved; the rest lies untouched at the
//   end. A kernel trusts the records: packed weights are never read from a file.
// Numbers: exact. Splitting a weight in two and adding in another order changes no sum.
#pragma once

#include <cstdint>

namespace qk {

inline constexpr int64_t kGroupColumns = 4;
inline constexpr int64_t kMostOrders = 3;
// Byte i of a quad in each order.
inline constexpr int kQuadOrder[kMostOrders][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {0, 3, 1, 2}};

struct ByteGroup {
  uint32_t at;  // of its record, in units of 32 bytes from the panels
  uint16_t doubles, singles;
};

// A row of K values is kept as so many quads, a multiple of 16 bytes.
inline constexpr int64_t kept_quads(int64_t k) { return (k + 15) / 16 * 4; }

struct PackSource;

struct IgemmBlock;

// Of the panels of `columns` (a multiple of 4) columns of k values.
int64_t byte_steps_bytes(int64_t columns, int64_t k);
// Writes them over zeros. Returns in how many orders the rows of A are read; 0: pairs are better,
// and the panels are zeros.
int32_t pack_byte_steps(const PackSource& source, int64_t columns, void* panels);

void igemm_avx2_steps(const IgemmBlock& block);

}  // namespace qk
