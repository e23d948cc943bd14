// Depthwise with three or five taps a row, without a scratch strip of the input. Include it in
// x86_avx512vnni.cc, inside its anonymous namespace, after struct Avx512.
//
// Trick: the interleaved columns of a window stay in registers; the next output drops as many as
//   its stride and reads as many. Nothing is stored but outputs, and weights are operands in
//   memory, so that shuffles, products and scaling have the ports to themselves. Five columns of
//   two groups of four rows do not fit for 64 channels: two passes over the strip take one unpack
//   instruction's low and high half each, and the first leaves its int16 in the scratch.
// Numbers, memory: as depthwise.h.

// A window of Taps columns and Rows rows, in Groups of four, for Outputs rows of outputs; each
// column is V vectors of channels, of which a pass takes H.
template <int Taps, int Rows, int Outputs, int Stride, int V, int H>
struct Window {
  static constexpr int kTaps = Taps, kRows = Rows, kOutputs = Outputs, kStride = Stride;
  static constexpr int kGroups = (Rows + 3) / 4;
  static constexpr int kVectors = V, kTaken = H, kPasses = V / H;
  using TapSequence = std::make_integer_sequence<int, Taps>;
  __m512i columns[Taps * kGroups][H];

  // Drops the first columns.
  inline __attribute__((always_inline)) void roll() {
#pragma GCC unroll 16
    for (int k = 0; k < (Taps - Stride) * kGroups; ++k) {
#pragma GCC unroll 4
      for (int j = 0; j < H; ++j) columns[k][j] = columns[k + Stride * kGroups][j];
    }
  }
};

// The input of a strip, column by column. `Whole`: a block of all channels, nothing to mask.
template <int V, int Rows, bool Flip, bool Whole>
struct Columns512 {
  using Row = Row512<V>;
  using Bytes = typename Row::Type;

  explicit Columns512(const DepthwiseStrip& s)
      : offsets(s.column_offset),
        mask(avx512::byte_lanes(s.channels)),
        flip(Row::fill(0x80)),
        padding(Row::fill(Flip ? s.padding ^ 0x80 : s.padding)) {
    for (int r = 0; r < Rows; ++r) rows[r] = s.rows[r];
  }

  // Group g of column `c`: a pass's part of it, interleaved.
  template <int Pass, int H>
  inline __attribute__((always_inline)) void read(int64_t c, int g, __m512i (&column)[H]) const {
    const int64_t offset = offsets[c];
    Bytes bytes[4];
    if (offset < 0) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) bytes[r] = padding;
    } else {
      // What stands in for a row behind the last one meets zero weights.
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const int row = 4 * g + r;
        bytes[r] = row >= Rows ? bytes[row % 2]
                               : Row::template load_masked<Flip, Whole>(
                                     rows[row < Rows ? row : 0] + offset, mask, flip);
      }
    }
    Row::template interleave_part<Pass>(bytes, column);
  }

  const int64_t* offsets;
  __mmask64 mask;  // of the channels of the block
  Bytes flip, padding;
  const uint8_t* rows[Rows];
};

// acc += a * the vector `Offset` bytes behind `weights`. Spelled out, as gcc would keep the address
// of each vector on the stack.
template <int Offset>
QK_INLINE void dot_at(__m512i& acc, __m512i a, const int8_t* weights) {
  asm("vpdpbusd %c3(%2), %1, %0" : "+v"(acc) : "v"(a), "r"(weights), "i"(Offset), "m"(*weights));
}

// The sums of a pass for output row `Row`, one for each vector and group: more products of one sum
// would wait for each other.
template <typename W, int Pass, int Row, int Tap, int... J>
QK_INLINE void add_tap(const int8_t* weights, const W& window,
                       __m512i (&sum)[W::kGroups][W::kTaken], std::integer_sequence<int, J...>) {
  constexpr int kVector = W::kOutputs * 64, kGroup = W::kVectors * kVector;
  constexpr int kFirst = Tap * W::kGroups * kGroup + Pass * W::kTaken * kVector + Row * 64;
  constexpr int kColumn = Tap * W::kGroups;
  (dot_at<kFirst + J * kVector>(sum[0][J], window.columns[kColumn][J], weights), ...);
  if constexpr (W::kGroups == 2) {
    (dot_at<kFirst + kGroup + J * kVector>(sum[1][J], window.columns[kColumn + 1][J], weights),
     ...);
  }
}

template <typename W, int Pass, int Row, int... Tap>
QK_INLINE void add_taps(const DepthwiseStrip& s, const W& window,
                        __m512i (&sum)[W::kGroups][W::kTaken], std::integer_sequence<int, Tap...>) {
  constexpr int H = W::kTaken;
#pragma GCC unroll 4
  for (int j = 0; j < H; ++j) {
    sum[0][j] = _mm512_loadu_si512(s.init + 16 * (Pass * H + j));
    if (W::kGroups == 2) sum[W::kGroups - 1][j] = _mm512_setzero_si512();
  }
  (add_tap<W, Pass, Row, Tap>(s.weights, window, sum, std::make_integer_sequence<int, H>()), ...);
  if constexpr (W::kGroups == 2) {
#pragma GCC unroll 4
    for (int j = 0; j < H; ++j) sum[0][j] = _mm512_add_epi32(sum[0][j], sum[1][j]);
  }
}

// An output, or in the first of two passes its first half, at `half`.
template <typename W, int Pass, int Row, bool Whole>
QK_INLINE void finish_output(const DepthwiseStrip& s, const W& window, bool bare, __mmask64 mask,
                             uint8_t* half, uint8_t* out) {
  constexpr int H = W::kTaken;
  __m512i sum[W::kGroups][H], pairs[W::kVectors / 2];
  add_taps<W, Pass, Row>(s, window, sum, std::make_integer_sequence<int, W::kTaps>());
#pragma GCC unroll 4
  for (int j = 0; j < H; ++j) {
    const int vector = Pass * H + j;
    sum[0][j] = Avx512::narrow(sum[0][j], _mm512_loadu_ps(s.addend + 16 * vector),
                               _mm512_loadu_ps(s.mult + 16 * vector));
  }
#pragma GCC unroll 2
  for (int i = 0; i < H / 2; ++i) {
    pairs[Pass * H / 2 + i] = _mm512_packs_epi32(sum[0][2 * i], sum[0][2 * i + 1]);
  }
  if constexpr (Pass + 1 < W::kPasses) {
    _mm512_store_si512(half, pairs[0]);
    return;
  }
  if constexpr (Pass > 0) pairs[0] = _mm512_load_si512(half);
  Row512<W::kVectors>::template store_masked<Whole>(
      out, mask, Avx512::pack_bytes<W::kVectors>(pairs, s, bare));
}

template <typename W, int Pass, bool Flip, bool Whole>
static __attribute__((noinline)) void roll_avx512(const DepthwiseStrip& strip) {
  const DepthwiseStrip s = strip;
  const Columns512<W::kVectors, W::kRows, Flip, Whole> input(strip);
  const bool bare = is_bare(s);
  uint8_t *out = s.out[0], *out_below = s.out[1], *half = s.scratch;
  int64_t step_below = s.out_step;
  if (W::kOutputs == 2 && out_below == nullptr) {  // an odd number of rows: computed for nothing
    out_below = s.scratch + 2 * 64 * s.outputs;
    step_below = 0;
  }
  W window;
  int64_t column = 0;
#pragma GCC unroll 4
  for (int tap = 0; tap < W::kTaps - W::kStride; ++tap, ++column) {
#pragma GCC unroll 2
    for (int g = 0; g < W::kGroups; ++g) {
      input.template read<Pass>(column, g, window.columns[tap * W::kGroups + g]);
    }
  }
  for (int64_t x = 0; x < s.outputs; ++x) {
#pragma GCC unroll 4
    for (int tap = W::kTaps - W::kStride; tap < W::kTaps; ++tap, ++column) {
#pragma GCC unroll 2
      for (int g = 0; g < W::kGroups; ++g) {
        input.template read<Pass>(column, g, window.columns[tap * W::kGroups + g]);
      }
    }
    finish_output<W, Pass, 0, Whole>(s, window, bare, input.mask, half, out);
    half += 64;
    if constexpr (W::kOutputs == 2) {
      finish_output<W, Pass, 1, Whole>(s, window, bare, input.mask, half, out_below);
      half += 64;
    }
    out += s.out_step;
    out_below += step_below;
    window.roll();
  }
}

template <typename W, bool Flip, bool Whole>
QK_INLINE void roll_passes(const DepthwiseStrip& s) {
  roll_avx512<W, 0, Flip, Whole>(s);
  if constexpr (W::kPasses == 2) roll_avx512<W, 1, Flip, Whole>(s);
}

template <typename W>
QK_INLINE void roll(const DepthwiseStrip& s) {
  if (s.channels < 16 * W::kVectors) {
    s.input_flip == 0 ? roll_passes<W, false, false>(s) : roll_passes<W, true, false>(s);
  } else {
    s.input_flip == 0 ? roll_passes<W, false, true>(s) : roll_passes<W, true, true>(s);
  }
}

// Loaded into a register; gcc would make it an operand of each instruction that reads it.
template <typename T>
QK_INLINE T once(T v) {
  asm("" : "+v"(v));
  return v;
}

// Of tap `tap` and vector `j`, for output row `row` of two.
template <int V>
QK_INLINE __m512i weights_of(const DepthwiseStrip& s, int tap, int j, int row) {
  return once(_mm512_load_si512(s.weights + ((tap * V + j) * 2 + row) * 64));
}

// Three taps and stride 1: two outputs beside each other of each of two rows, which share what is
// loaded: 44 loads for 256 outputs, not 80. (A core that loads 512 bits a cycle would be at its
// limit.) For vector `j`. The addends and factors lie behind the first sums: addressed from there,
// they leave gcc the registers that it needs.
template <int V>
QK_INLINE void finish_square(const DepthwiseStrip& s, const __m512i (&columns)[4][V], int j,
                             __m512i (&sum)[2][2]) {
  sum[0][0] = sum[0][1] = sum[1][0] = sum[1][1] = once(_mm512_loadu_si512(s.init + 16 * j));
#pragma GCC unroll 3
  for (int tap = 0; tap < 3; ++tap) {
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) {
      const __m512i weights = weights_of<V>(s, tap, j, row);
      Avx512::dot(sum[0][row], columns[tap][j], weights);
      Avx512::dot(sum[1][row], columns[tap + 1][j], weights);
    }
  }
  const __m512 addend = once(_mm512_loadu_ps(s.init + 16 * (V + j)));
  const __m512 mult = once(_mm512_loadu_ps(s.init + 16 * (2 * V + j)));
#pragma GCC unroll 2
  for (int x = 0; x < 2; ++x) {
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) sum[x][row] = Avx512::narrow(sum[x][row], addend, mult);
  }
}

template <int V, bool Flip, bool Whole>
static __attribute__((noinline)) void roll_squares_avx512(const DepthwiseStrip& strip) {
  const DepthwiseStrip s = strip;
  const Columns512<V, 4, Flip, Whole> input(strip);
  const bool bare = is_bare(s);
  uint8_t *out = s.out[0], *below = s.out[1];
  int64_t step_below = s.out_step;
  if (below == nullptr) {
    below = s.scratch;
    step_below = 0;
  }
  __m512i columns[4][V];
  input.template read<0>(0, 0, columns[0]);
  input.template read<0>(1, 0, columns[1]);
  for (int64_t x = 0; x < s.outputs; x += 2) {
    input.template read<0>(x + 2, 0, columns[2]);
    const bool both = x + 1 < s.outputs;
    if (both) input.template read<0>(x + 3, 0, columns[3]);
    __m512i pairs[2][2][V / 2];
#pragma GCC unroll 2
    for (int pair = 0; pair < V / 2; ++pair) {
      __m512i low[2][2], high[2][2];
      finish_square<V>(s, columns, 2 * pair, low);
      finish_square<V>(s, columns, 2 * pair + 1, high);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
        for (int row = 0; row < 2; ++row) {
          pairs[i][row][pair] = _mm512_packs_epi32(low[i][row], high[i][row]);
        }
      }
    }
    using Row = Row512<V>;
    Row::template store_masked<Whole>(out, input.mask, Avx512::pack_bytes<V>(pairs[0][0], s, bare));
    Row::template store_masked<Whole>(below, input.mask,
                                      Avx512::pack_bytes<V>(pairs[0][1], s, bare));
    if (both) {
      Row::template store_masked<Whole>(out + s.out_step, input.mask,
                                        Avx512::pack_bytes<V>(pairs[1][0], s, bare));
      Row::template store_masked<Whole>(below + step_below, input.mask,
                                        Avx512::pack_bytes<V>(pairs[1][1], s, bare));
    }
    out += 2 * s.out_step;
    below += 2 * step_below;
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) columns[0][j] = columns[2][j], columns[1][j] = columns[3][j];
  }
}

template <int V>
QK_INLINE void roll_squares(const DepthwiseStrip& s) {
  if (s.channels < 16 * V) {
    s.input_flip == 0 ? roll_squares_avx512<V, false, false>(s)
                      : roll_squares_avx512<V, true, false>(s);
  } else {
    s.input_flip == 0 ? roll_squares_avx512<V, false, true>(s)
                      : roll_squares_avx512<V, true, true>(s);
  }
}

template <int V>
QK_INLINE void depthwise_block(const DepthwiseStrip& s) {
  if (s.tap_step == 1 && s.quads == 0 && s.out_group == 1 && s.acc == nullptr) {
    const int64_t taps = s.taps, window = s.window, rows = s.rows_out, step = s.column_step;
    if (taps == 3 && s.row_groups == 1) {
      if (rows == 2 && step == 1) return roll_squares<V>(s);
      if (window == 3 && rows == 1 && step == 2) return roll<Window<3, 3, 1, 2, V, V>>(s);
    }
    if (taps == 5 && s.row_groups == 2 && rows == 2) {
      if (window == 6 && step == 1) return roll<Window<5, 6, 2, 1, V, 2>>(s);
      if (window == 7 && step == 2) return roll<Window<5, 7, 2, 2, V, 2>>(s);
    }
  }
  block<Avx512, V>(s);
}
