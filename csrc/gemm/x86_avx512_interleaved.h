// Tiles whose outputs are computed between the products of the next tile, in assembler. Include it
// in x86_avx512vnni.cc, after IgemmTile, Panel, Packing, Requantize64 and FusedAddX16.
//
// Layout: a tile has twelve vectors of sums: three rows of 64 columns, six of 32, twelve of 16 or
//   eight of 24. Either way they are three groups of four that become 64 bytes each: vector j of a
//   group holds columns 16 * (j % V); of 24 columns two groups hold the first 16 of eight rows and
//   vector j of the third the last eight of rows 2 * j and 2 * j + 1. Two tiles take turns with 24
//   registers: one collects products while the other is scaled, added to its residual, packed and
//   stored.
// Numbers: as epilogue.h; the conversion rounds as the caller's mode says, to nearest even.
// Trick: products and most of an epilogue use different pipes, but gcc keeps neither this order nor
//   24 sums and all else in registers. The first tile has none before it: it finishes whatever the
//   registers hold, and writes it where nobody reads.

#define QK_X0 "%%zmm0"
#define QK_X1 "%%zmm1"
#define QK_X2 "%%zmm2"
#define QK_X3 "%%zmm3"
#define QK_X4 "%%zmm4"
#define QK_X5 "%%zmm5"
#define QK_X6 "%%zmm6"
#define QK_X7 "%%zmm7"
#define QK_X8 "%%zmm8"
#define QK_X9 "%%zmm9"
#define QK_X10 "%%zmm10"
#define QK_X11 "%%zmm11"
#define QK_Y0 "%%zmm12"
#define QK_Y1 "%%zmm13"
#define QK_Y2 "%%zmm14"
#define QK_Y3 "%%zmm15"
#define QK_Y4 "%%zmm16"
#define QK_Y5 "%%zmm17"
#define QK_Y6 "%%zmm18"
#define QK_Y7 "%%zmm19"
#define QK_Y8 "%%zmm20"
#define QK_Y9 "%%zmm21"
#define QK_Y10 "%%zmm22"
#define QK_Y11 "%%zmm23"
#define QK_B0 "%%zmm24"
#define QK_B1 "%%zmm25"
#define QK_B2 "%%zmm26"
#define QK_B3 "%%zmm27"
#define QK_A "%%zmm28"
#define QK_C "%%zmm29"
#define QK_R "%%zmm30"
#define QK_FACTOR "%%zmm31"
#define QK_HIGH_LANES "%%k1"

// What the assembler reads besides its registers.
struct InterleavedContext {
  const int32_t* init;
  const float *addend, *mult;
  const int8_t* weights;
  const uint8_t* const* quads;     // where each quad of the first row lies
  int64_t more_quads;              // behind those that outputs are computed between
  int64_t step;                    // from a row to that of the next tile
  uint8_t* const* out;             // the rows of the tile that is being finished
  uint8_t* const* next_out;        // of the tile after it
  const uint8_t* const* residual;  // the same
  const uint8_t* const* next_residual;
  alignas(64) Requantize64 constants;
  FusedAddX16 add;     // with a residual
  __m512i flip_input;  // of int8 rows
};
#define QK_INIT "(%[c])"
#define QK_ADDEND "8(%[c])"
#define QK_MULT "8 * 2(%[c])"
#define QK_PANEL "8 * 3(%[c])"
#define QK_FIRST_QUAD "8 * 4(%[c])"
#define QK_MORE_QUADS "8 * 5(%[c])"
#define QK_STEP "8 * 6(%[c])"
#define QK_OUT "8 * 7(%[c])"
#define QK_NEXT_OUT "8 * 8(%[c])"
#define QK_RESIDUAL "8 * 9(%[c])"
#define QK_NEXT_RESIDUAL "8 * 10(%[c])"
#define QK_ZERO_POINT "64 * 2(%[c])"
#define QK_CLAMP_LOW "64 * 3(%[c])"
#define QK_CLAMP_HIGH "64 * 4(%[c])"
#define QK_FLIP_BYTES "64 * 5(%[c])"
#define QK_ORDER "64 * 6(%[c])"
#define QK_LOW "64 * 7(%[c])"
#define QK_HIGH "64 * 8(%[c])"
#define QK_UP "64 * 9(%[c])"
#define QK_DOWN "64 * 10(%[c])"
#define QK_SCALE "64 * 11(%[c])"
#define QK_OFFSET "64 * 12(%[c])"
#define QK_RESIDUAL_SCALE "64 * 13(%[c])"
#define QK_RESIDUAL_OFFSET "64 * 14(%[c])"
#define QK_INVERSE "64 * 15(%[c])"
#define QK_FLIP_INPUT "64 * 16(%[c])"
static_assert(offsetof(InterleavedContext, step) == 8 * 6);
static_assert(offsetof(InterleavedContext, next_residual) == 8 * 10);
static_assert(offsetof(InterleavedContext, constants) == 64 * 2);
static_assert(offsetof(Requantize64, order) == 64 * 4);
static_assert(offsetof(InterleavedContext, add) == 64 * 7);
static_assert(offsetof(FusedAddX16, high) == 64 * 1);
static_assert(offsetof(FusedAddX16, down) == 64 * 3);
static_assert(offsetof(FusedAddX16, offset) == 64 * 5);
static_assert(offsetof(FusedAddX16, residual_offset) == 64 * 7);
static_assert(offsetof(FusedAddX16, inv) == 64 * 8);
static_assert(offsetof(InterleavedContext, flip_input) == 64 * 16);

// clang-format off
#define QK_OP(name, operands) name " " operands "\n\t"
#define QK_TO(name, from, to) QK_OP(name, from ", " to)
#define QK_BY(name, b, a) QK_OP(name, b ", " a ", " a)
#define QK_IF(condition, x) ".if " condition "\n\t" x ".endif\n\t"
#define QK_WIDE(x) QK_IF("%c[v] == 4", x)
#define QK_HALF(x) QK_IF("%c[v] == 2 && !%c[shared]", x)
#define QK_SHARED(x) QK_IF("%c[shared]", x)
#define QK_BOTH_HALVES(from, to) QK_TO("vbroadcasti64x4", from, to)
#define QK_QUARTER(x) QK_IF("%c[v] == 1", x)

// The rows of a tile, when p0 to p3 point to a quad of rows 0, 3, 6 and 9.
#define QK_ROW0 "(%[p0])"
#define QK_ROW1 "(%[p0], %[stride])"
#define QK_ROW2 "(%[p0], %[stride], 2)"
#define QK_ROW3 "(%[p1])"
#define QK_ROW4 "(%[p1], %[stride])"
#define QK_ROW5 "(%[p1], %[stride], 2)"
#define QK_ROW6 "(%[p2])"
#define QK_ROW7 "(%[p2], %[stride])"
#define QK_ROW8 "(%[p2], %[stride], 2)"
#define QK_ROW9 "(%[p3])"
#define QK_ROW10 "(%[p3], %[stride])"
#define QK_ROW11 "(%[p3], %[stride], 2)"

// S = init
#define QK_COPY(from, to) QK_TO("vmovdqa64", from, to)
#define QK_START(S)                                                          \
  QK_TO("movq", QK_INIT, "%[t]")                                             \
  QK_COPY("(%[t])", S##0)                                                    \
  QK_WIDE(QK_COPY("64(%[t])", S##1) QK_COPY("128(%[t])", S##2)               \
          QK_COPY("192(%[t])", S##3))                                        \
  QK_HALF(QK_COPY("64(%[t])", S##1) QK_COPY(S##0, S##2) QK_COPY(S##1, S##3)) \
  QK_IF("%c[v] == 1 || %c[shared]",                                          \
        QK_COPY(S##0, S##1) QK_COPY(S##0, S##2) QK_COPY(S##0, S##3))         \
  QK_COPY(S##0, S##4) QK_COPY(S##1, S##5) QK_COPY(S##2, S##6)                \
  QK_COPY(S##3, S##7)                                                        \
  ".if %c[shared]\n\t"                                                       \
  QK_BOTH_HALVES("64(%[t])", S##8)                                           \
  QK_COPY(S##8, S##9) QK_COPY(S##8, S##10) QK_COPY(S##8, S##11)              \
  ".else\n\t"                                                                \
  QK_COPY(S##0, S##8) QK_COPY(S##1, S##9) QK_COPY(S##2, S##10)               \
  QK_COPY(S##3, S##11)                                                       \
  ".endif\n\t"

// S += the products of quad `k`, a number, behind the cursors; something else behind each group.
#define QK_WEIGHTS(k, j, to) QK_COPY("64 * (%c[v] * " #k " + " #j ")(%[b])", to)
#define QK_QUAD_POINTERS(k)                                       \
  QK_TO("movq", "8 * " #k "(%[quad])", "%[p0]")                   \
  QK_TO("add", "%[row]", "%[p0]")                                 \
  QK_IF("%c[v] < 4", QK_TO("lea", "(%[p0], %[stride3])", "%[p1]")) \
  QK_IF("%c[v] == 1 || %c[shared]",                               \
        QK_TO("lea", "(%[p0], %[stride3], 2)", "%[p2]"))          \
  QK_QUARTER(QK_TO("lea", "(%[p1], %[stride3], 2)", "%[p3]"))
#define QK_VALUES(row)                                            \
  QK_TO("vpbroadcastd", row, QK_A)                                \
  QK_IF("%c[flips]", QK_BY("vpxord", QK_FLIP_INPUT, QK_A))
#define QK_DOT(sum, weights) QK_OP("vpdpbusd", weights ", " QK_A ", " sum)
#define QK_PRODUCTS(s0, s1, s2, s3, wide, half0, half1, quarter0, quarter1, quarter2, quarter3) \
  QK_WIDE(QK_VALUES(wide)                                                   \
          QK_DOT(s0, QK_B0) QK_DOT(s1, QK_B1) QK_DOT(s2, QK_B2) QK_DOT(s3, QK_B3)) \
  QK_HALF(QK_VALUES(half0) QK_DOT(s0, QK_B0) QK_DOT(s1, QK_B1)              \
          QK_VALUES(half1) QK_DOT(s2, QK_B0) QK_DOT(s3, QK_B1))             \
  QK_QUARTER(QK_VALUES(quarter0) QK_DOT(s0, QK_B0)                          \
             QK_VALUES(quarter1) QK_DOT(s1, QK_B0)                          \
             QK_VALUES(quarter2) QK_DOT(s2, QK_B0)                          \
             QK_VALUES(quarter3) QK_DOT(s3, QK_B0))
// Of 24 columns: two rows, and the vector that they share.
#define QK_PAIR_PRODUCTS(s0, s1, both, row0, row1)                          \
  QK_VALUES(row0) QK_DOT(s0, QK_B0)                                         \
  QK_TO("vpbroadcastd", row1, QK_B2) QK_OP("vpdpbusd", QK_B0 ", " QK_B2 ", " s1) \
  QK_TO("vmovdqa32", QK_B2, QK_A "%{" QK_HIGH_LANES "%}") QK_DOT(both, QK_B1)
#define QK_QUAD(k, S, else0, else1, else2)                                  \
  QK_QUAD_POINTERS(k)                                                       \
  QK_OP("prefetcht1", "64 * %c[v] * " #k "(%[b], %[ahead])")                \
  QK_WEIGHTS(k, 0, QK_B0)                                                   \
  QK_IF("%c[v] > 1 && !%c[shared]", QK_WEIGHTS(k, 1, QK_B1))                \
  QK_SHARED(QK_BOTH_HALVES("64 * (2 * " #k " + 1)(%[b])", QK_B1))           \
  QK_WIDE(QK_WEIGHTS(k, 2, QK_B2) QK_WEIGHTS(k, 3, QK_B3))                  \
  QK_SHARED(QK_PAIR_PRODUCTS(S##0, S##1, S##8, QK_ROW0, QK_ROW1)            \
            QK_PAIR_PRODUCTS(S##2, S##3, S##9, QK_ROW2, QK_ROW3))           \
  QK_PRODUCTS(S##0, S##1, S##2, S##3,                                       \
              QK_ROW0, QK_ROW0, QK_ROW1, QK_ROW0, QK_ROW1, QK_ROW2, QK_ROW3) else0 \
  QK_SHARED(QK_PAIR_PRODUCTS(S##4, S##5, S##10, QK_ROW4, QK_ROW5)           \
            QK_PAIR_PRODUCTS(S##6, S##7, S##11, QK_ROW6, QK_ROW7))          \
  QK_PRODUCTS(S##4, S##5, S##6, S##7,                                       \
              QK_ROW1, QK_ROW2, QK_ROW3, QK_ROW4, QK_ROW5, QK_ROW6, QK_ROW7) else1 \
  QK_PRODUCTS(S##8, S##9, S##10, S##11,                                     \
              QK_ROW2, QK_ROW4, QK_ROW5, QK_ROW8, QK_ROW9, QK_ROW10, QK_ROW11) else2

// The stages of an output, of three vectors at a time: vector `j` of each group.
#define QK_EACH(name, s0, s1, s2) QK_TO(name, s0, s0) QK_TO(name, s1, s1) QK_TO(name, s2, s2)
#define QK_EACH_BY(name, constant, s0, s1, s2)                              \
  QK_TO("vmovaps", constant, QK_C)                                          \
  QK_BY(name, QK_C, s0) QK_BY(name, QK_C, s1) QK_BY(name, QK_C, s2)
#define QK_EACH_BY_COLUMNS(name, j, s0, s1, s2)                             \
  ".if %c[shared]\n\t"                                                      \
  QK_TO("vmovaps", "(%[t])", QK_C) QK_BY(name, QK_C, s0) QK_BY(name, QK_C, s1) \
  QK_BOTH_HALVES("64(%[t])", QK_C) QK_BY(name, QK_C, s2)                    \
  ".else\n\t"                                                               \
  QK_EACH_BY(name, "64 * (" #j " & (%c[v] - 1))(%[t])", s0, s1, s2)         \
  ".endif\n\t"
// s = float(s) + addend
#define QK_ADDS(j, s0, s1, s2)                                              \
  QK_EACH("vcvtdq2ps", s0, s1, s2)                                          \
  QK_TO("movq", QK_ADDEND, "%[t]")                                          \
  QK_EACH_BY_COLUMNS("vaddps", j, s0, s1, s2)
// s = s * mult
#define QK_SCALES(j, s0, s1, s2)                                            \
  QK_TO("movq", QK_MULT, "%[t]")                                            \
  QK_EACH_BY_COLUMNS("vmulps", j, s0, s1, s2)
#define QK_ROUNDS(s0, s1, s2) QK_EACH("vcvtps2dq", s0, s1, s2)
// s = the value of its code, as FusedAddX16::run()
#define QK_CLAMPS(s0, s1, s2)                                               \
  QK_EACH_BY("vmaxps", QK_LOW, s0, s1, s2) QK_EACH_BY("vminps", QK_HIGH, s0, s1, s2)
#define QK_CODES(s0, s1, s2)                                                \
  QK_EACH_BY("vaddps", QK_UP, s0, s1, s2) QK_EACH_BY("vsubps", QK_DOWN, s0, s1, s2)
#define QK_FMA(offset, s) QK_OP("vfmadd213ps", offset ", " QK_FACTOR ", " s)
#define QK_VALUES_OF_CODES(s0, s1, s2)                                      \
  QK_TO("vmovaps", QK_SCALE, QK_FACTOR)                                     \
  QK_FMA(QK_OFFSET, s0) QK_FMA(QK_OFFSET, s1) QK_FMA(QK_OFFSET, s2)
// s += the residual of group g
#define QK_RESIDUAL_ROW(row)                                                \
  QK_TO("movq", QK_RESIDUAL, "%[t]") QK_TO("movq", "8 * (" row ")(%[t])", "%[t]")
#define QK_ADD_RESIDUAL(g, j, s)                                            \
  ".if !%c[shared]\n\t"                                                     \
  QK_RESIDUAL_ROW("(4 * " #g " + " #j ") / %c[v]")                          \
  QK_TO("vpmovzxbd", "16 * (" #j " & (%c[v] - 1))(%[t])", QK_R)             \
  ".elseif " #g " < 2\n\t"                                                  \
  QK_RESIDUAL_ROW("4 * " #g " + " #j) QK_TO("vpmovzxbd", "(%[t])", QK_R)    \
  ".else\n\t"                                                               \
  QK_RESIDUAL_ROW("2 * " #j) QK_TO("vmovq", "16(%[t])", "%%xmm30")          \
  QK_RESIDUAL_ROW("2 * " #j " + 1") QK_BY("vmovhps", "16(%[t])", "%%xmm30") \
  QK_TO("vpmovzxbd", "%%xmm30", QK_R)                                       \
  ".endif\n\t"                                                              \
  QK_TO("vmovaps", QK_RESIDUAL_SCALE, QK_FACTOR)                            \
  QK_TO("vcvtdq2ps", QK_R, QK_R)                                            \
  QK_FMA(QK_RESIDUAL_OFFSET, QK_R)                                          \
  QK_BY("vaddps", QK_R, s)
#define QK_RESCALES(s0, s1, s2) QK_EACH_BY("vmulps", QK_INVERSE, s0, s1, s2)

// Group g to bytes, and to its rows.
#define QK_ROW(row) QK_TO("movq", QK_OUT, "%[t]") QK_TO("movq", "8 * (" row ")(%[t])", "%[t]")
#define QK_PART(name, part, s, row) QK_ROW(row) QK_OP(name, "$" #part ", " s ", (%[t])")
// Of 24 columns: the last eight of two rows.
#define QK_ENDS(pair, s)                                                    \
  QK_OP("vextracti32x4", "$" #pair ", " s ", %%xmm29")                      \
  QK_ROW("2 * " #pair) QK_TO("vmovlps", "%%xmm29", "16(%[t])")              \
  QK_ROW("2 * " #pair " + 1") QK_TO("vmovhps", "%%xmm29", "16(%[t])")
#define QK_PACK(g, s0, s1, s2, s3)                                          \
  QK_BY("vpackssdw", s1, s0) QK_BY("vpackssdw", s3, s2)                     \
  QK_IF("%c[shifts]",                                                       \
        QK_BY("vpaddsw", QK_ZERO_POINT, s0) QK_BY("vpaddsw", QK_ZERO_POINT, s2)) \
  QK_BY("vpackuswb", s2, s0)                                                \
  QK_COPY(QK_ORDER, QK_C) QK_OP("vpermd", s0 ", " QK_C ", " s0)             \
  QK_IF("%c[clamps]",                                                       \
        QK_BY("vpmaxub", QK_CLAMP_LOW, s0) QK_BY("vpminub", QK_CLAMP_HIGH, s0) \
        QK_BY("vpxord", QK_FLIP_BYTES, s0))                                 \
  ".if %c[v] == 4 || %c[dense]\n\t"                                         \
  QK_ROW(#g " * 4 / %c[v]") QK_TO("vmovdqu64", s0, "(%[t])")                \
  ".elseif %c[shared] && " #g " == 2\n\t"                                   \
  QK_ENDS(0, s0) QK_ENDS(1, s0) QK_ENDS(2, s0) QK_ENDS(3, s0)               \
  ".elseif %c[v] == 2 && !%c[shared]\n\t"                                   \
  QK_PART("vextracti64x4", 0, s0, "2 * " #g)                                \
  QK_PART("vextracti64x4", 1, s0, "2 * " #g " + 1")                         \
  ".else\n\t"                                                               \
  QK_PART("vextracti32x4", 0, s0, "4 * " #g)                                \
  QK_PART("vextracti32x4", 1, s0, "4 * " #g " + 1")                         \
  QK_PART("vextracti32x4", 2, s0, "4 * " #g " + 2")                         \
  QK_PART("vextracti32x4", 3, s0, "4 * " #g " + 3")                         \
  ".endif\n\t"

// Four quads for S and all outputs of T.
#define QK_QUADS_AND_OUTPUTS(S, T)                                          \
  QK_QUAD(0, S, QK_ADDS(0, T##0, T##4, T##8),                               \
          QK_SCALES(0, T##0, T##4, T##8) QK_ROUNDS(T##0, T##4, T##8),       \
          QK_ADDS(1, T##1, T##5, T##9))                                     \
  QK_QUAD(1, S, QK_SCALES(1, T##1, T##5, T##9) QK_ROUNDS(T##1, T##5, T##9), \
          QK_ADDS(2, T##2, T##6, T##10),                                    \
          QK_SCALES(2, T##2, T##6, T##10) QK_ROUNDS(T##2, T##6, T##10))     \
  QK_QUAD(2, S, QK_ADDS(3, T##3, T##7, T##11),                              \
          QK_SCALES(3, T##3, T##7, T##11) QK_ROUNDS(T##3, T##7, T##11),     \
          QK_PACK(0, T##0, T##1, T##2, T##3))                               \
  QK_QUAD(3, S, QK_PACK(1, T##4, T##5, T##6, T##7), QK_PACK(2, T##8, T##9, T##10, T##11), "")
// Thirteen quads for S and all outputs of T, which are added to a residual.
#define QK_QUADS_AND_ADDITIONS(k0, k1, k2, S, j, s0, s1, s2)                \
  QK_QUAD(k0, S, QK_ADDS(j, s0, s1, s2), QK_SCALES(j, s0, s1, s2), QK_CLAMPS(s0, s1, s2)) \
  QK_QUAD(k1, S, QK_CODES(s0, s1, s2), QK_VALUES_OF_CODES(s0, s1, s2),      \
          QK_ADD_RESIDUAL(0, j, s0))                                        \
  QK_QUAD(k2, S, QK_ADD_RESIDUAL(1, j, s1), QK_ADD_RESIDUAL(2, j, s2),      \
          QK_RESCALES(s0, s1, s2) QK_ROUNDS(s0, s1, s2))
#define QK_QUADS_AND_RESIDUAL(S, T)                                         \
  QK_QUADS_AND_ADDITIONS(0, 1, 2, S, 0, T##0, T##4, T##8)                   \
  QK_QUADS_AND_ADDITIONS(3, 4, 5, S, 1, T##1, T##5, T##9)                   \
  QK_QUADS_AND_ADDITIONS(6, 7, 8, S, 2, T##2, T##6, T##10)                  \
  QK_QUADS_AND_ADDITIONS(9, 10, 11, S, 3, T##3, T##7, T##11)                \
  QK_QUAD(12, S, QK_PACK(0, T##0, T##1, T##2, T##3),                        \
          QK_PACK(1, T##4, T##5, T##6, T##7), QK_PACK(2, T##8, T##9, T##10, T##11))

// The sums of a tile in S, while that of T, the one before, is finished. `more`, `done`: labels.
// The weights that are fetched ahead lie 64 bytes further for each tile.
#define QK_NEXT_ROWS(rows, next)                                            \
  QK_TO("movq", next, "%[t]") QK_TO("movq", "%[t]", rows)                   \
  QK_TO("addq", "$8 * %c[rows]", next)
#define QK_TILE(S, T, more, done)                                           \
  QK_START(S)                                                               \
  QK_TO("movq", QK_PANEL, "%[b]") QK_TO("movq", QK_FIRST_QUAD, "%[quad]")   \
  ".if %c[adds]\n\t"                                                        \
  QK_QUADS_AND_RESIDUAL(S, T)                                               \
  ".else\n\t"                                                               \
  QK_QUADS_AND_OUTPUTS(S, T)                                                \
  ".endif\n\t"                                                              \
  QK_TO("add", "$64 * %c[v] * (4 + 9 * %c[adds])", "%[b]")                  \
  QK_TO("add", "$8 * (4 + 9 * %c[adds])", "%[quad]")                        \
  QK_TO("movq", QK_MORE_QUADS, "%[t]")                                      \
  QK_TO("test", "%[t]", "%[t]")                                             \
  QK_OP("jz", done "f")                                                     \
  more ":\n\t"                                                              \
  QK_QUAD(0, S, "", "", "")                                                 \
  QK_TO("add", "$64 * %c[v]", "%[b]")                                       \
  QK_TO("add", "$8", "%[quad]")                                             \
  QK_OP("dec", "%[t]")                                                      \
  QK_OP("jnz", more "b")                                                    \
  done ":\n\t"                                                              \
  QK_TO("add", QK_STEP, "%[row]")                                           \
  QK_TO("add", "$64", "%[ahead]")                                           \
  QK_NEXT_ROWS(QK_OUT, QK_NEXT_OUT)                                         \
  QK_IF("%c[adds]", QK_NEXT_ROWS(QK_RESIDUAL, QK_NEXT_RESIDUAL))
// The outputs of the last tile.
#define QK_FINISH(j, s0, s1, s2)                                            \
  QK_ADDS(j, s0, s1, s2) QK_SCALES(j, s0, s1, s2)                           \
  QK_IF("%c[adds]",                                                         \
        QK_CLAMPS(s0, s1, s2) QK_CODES(s0, s1, s2) QK_VALUES_OF_CODES(s0, s1, s2) \
        QK_ADD_RESIDUAL(0, j, s0) QK_ADD_RESIDUAL(1, j, s1) QK_ADD_RESIDUAL(2, j, s2) \
        QK_RESCALES(s0, s1, s2))                                            \
  QK_ROUNDS(s0, s1, s2)
#define QK_LAST(T)                                                          \
  QK_FINISH(0, T##0, T##4, T##8) QK_FINISH(1, T##1, T##5, T##9)             \
  QK_FINISH(2, T##2, T##6, T##10) QK_FINISH(3, T##3, T##7, T##11)           \
  QK_PACK(0, T##0, T##1, T##2, T##3) QK_PACK(1, T##4, T##5, T##6, T##7)     \
  QK_PACK(2, T##8, T##9, T##10, T##11)
// clang-format on

// How the sums of a tile become bytes.
struct Finish {
  bool flips;           // A is int8
  bool adds;            // a residual of uint8
  bool shifts, clamps;  // as Packing
  bool dense;           // the rows of a group follow one another in memory
};

constexpr int64_t kMostInterleavedQuads = 64;
constexpr int64_t least_interleaved_quads(bool adds) { return adds ? 13 : 4; }
// Twelve vectors of sums, of 64, 32, 24 or 16 columns.
constexpr int64_t interleaved_rows(int64_t columns) { return 12 * 16 / columns; }

// `tiles` tiles, one below the other.
template <int Columns, Finish F>
__attribute__((noinline)) void run_interleaved_avx512(IgemmTile& tile, int64_t tiles) {
  constexpr int kRows = interleaved_rows(Columns), kVectors = (Columns + 15) / 16;
  const Panel panel(tile);
  const Epilogue& e = tile.matrix->header->epilogue;
  const uint8_t* quads[kMostInterleavedQuads];
  int64_t count = 0;
  for (int64_t tap = 0; tap < panel.taps; ++tap) {
    const uint8_t* row = tile.rows[tap] + tile.first_offset;
    for (int64_t k = 0; k < panel.quads; ++k) quads[count++] = row + 4 * k;
    if (panel.overlaps) quads[count++] = row + panel.depth - 4;
  }
  alignas(64) uint8_t nowhere[64];
  uint8_t* no_rows[kRows];
  for (uint8_t*& row : no_rows) row = nowhere;
  const int64_t stride = tile.row_stride, stride3 = 3 * stride;
  InterleavedContext context;
  context.init = panel.init;
  context.addend = panel.addend;
  context.mult = panel.mult;
  context.weights = panel.weights;
  context.quads = quads;
  context.more_quads = count - least_interleaved_quads(F.adds);
  context.step = kRows * stride;
  context.out = no_rows;
  context.next_out = tile.out;
  context.residual = no_rows;
  context.next_residual = tile.residual;
  context.constants = (F.adds ? Packing(e, e.residual) : Packing(e)).constants;
  if (F.adds) context.add = FusedAddX16(e);
  if (F.flips) context.flip_input = _mm512_set1_epi8(static_cast<char>(0x80));
  int64_t ahead = tile.ahead, left = tiles, row = 0, t;
  const int8_t* b;
  const uint8_t* const* quad;
  const uint8_t *p0, *p1, *p2, *p3;
  // clang-format off
  __asm__ volatile(
      QK_IF("%c[shared]", "mov $0xff00, %k[t]\n\t" "kmovw %k[t], " QK_HIGH_LANES "\n\t")
      "1:\n\t"
      QK_TILE(QK_X, QK_Y, "2", "3")
      QK_OP("dec", "%[left]")
      QK_OP("jz", "6f")
      QK_TILE(QK_Y, QK_X, "4", "5")
      QK_OP("dec", "%[left]")
      QK_OP("jnz", "1b")
      QK_LAST(QK_Y)
      QK_OP("jmp", "7f")
      "6:\n\t"
      QK_LAST(QK_X)
      "7:\n\t"
      "vzeroupper\n\t"
      : [p0] "=&r"(p0), [p1] "=&r"(p1), [p2] "=&r"(p2), [p3] "=&r"(p3), [b] "=&r"(b),
        [quad] "=&r"(quad), [t] "=&r"(t), [row] "+&r"(row), [ahead] "+&r"(ahead), [left] "+&r"(left)
      : [stride] "r"(stride), [stride3] "r"(stride3), [c] "r"(&context), [v] "i"(kVectors),
        [flips] "i"(F.flips), [adds] "i"(F.adds), [shifts] "i"(F.shifts), [clamps] "i"(F.clamps),
        [dense] "i"(F.dense), [shared] "i"(Columns == 24), [rows] "i"(kRows)
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
        "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",
        "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",
        "xmm29", "xmm30", "xmm31", "k1");
  // clang-format on
  tile.advance(kRows * tiles);
}

// What the assembler is written for: bytes, whole quads (AMX's layout, which may come here, has a
// tail where AVX512-VNNI's overlaps), no more of them than L1 holds beside the rows.
QK_INLINE bool may_interleave(const PackedHeader& header, int64_t columns) {
  const Epilogue& e = header.epilogue;
  const int64_t quads = header.taps * ((header.depth + 3) / 4);
  if (!header.stores_plain_bytes()) return false;
  if (header.depth % 4 != 0 && !overlaps_tail(header.isa, header.depth)) return false;
  if (columns != 64 && (header.input_signed || columns % 8 != 0 || columns < 16 || columns > 32)) {
    return false;
  }
  if (e.has_residual && (header.input_signed || e.is_signed() || e.residual_clamps())) return false;
  return quads >= least_interleaved_quads(e.has_residual) && quads <= kMostInterleavedQuads;
}
// And rows evenly apart.
QK_INLINE bool interleaves(const IgemmTile& tile) {
  return may_interleave(*tile.matrix->header, tile.columns) && tile.row_pitch == 0 &&
         !tile.residual_signed;
}

template <int Columns, bool Flip, bool Dense>
QK_INLINE void run_interleaved_as(IgemmTile& tile, int64_t tiles) {
  const Epilogue& e = tile.matrix->header->epilogue;
  const Packing packing(e);
  if constexpr (!Flip) {
    if (e.has_residual) {
      return run_interleaved_avx512<Columns, Finish{false, true, true, false, Dense}>(tile, tiles);
    }
  }
  if (packing.clamps) {
    run_interleaved_avx512<Columns, Finish{Flip, false, true, true, false}>(tile, tiles);
  } else if (packing.shifts) {
    run_interleaved_avx512<Columns, Finish{Flip, false, true, false, Dense}>(tile, tiles);
  } else {
    run_interleaved_avx512<Columns, Finish{Flip, false, false, false, Dense}>(tile, tiles);
  }
}

template <int Columns, bool Flip>
QK_INLINE void run_interleaved(IgemmTile& tile, int64_t tiles) {
  if constexpr (Columns == 16 || Columns == 32) {
    const int64_t last = interleaved_rows(Columns) * tiles - 1;
    if (tile.out[last] - tile.out[0] == last * Columns) {
      return run_interleaved_as<Columns, Flip, true>(tile, tiles);
    }
  }
  run_interleaved_as<Columns, Flip, false>(tile, tiles);
}
