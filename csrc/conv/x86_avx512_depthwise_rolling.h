// Depthwise with three or five taps a row, without a scratch strip of the input. Include it in
// x86_avx512vnni.cc, inside its anonymous namespace, after struct Avx512.
//
// Trick: the interleaved columns of a window stay in registers; the next outputs drop as many as
//   their stride and read as many. Two outputs beside each other, and those of two rows, share what
//   is loaded: 44 loads for 256 outputs of 3x3, where one at a time takes 80 and a core that loads
//   512 bits a cycle waits for them. Nothing is stored but outputs. Five columns of two groups of
//   four rows do not fit for 64 channels: two passes over the strip take one unpack instruction's
//   low and high half each, and the first leaves its int16 in the scratch.
// Numbers, memory: as depthwise.h.

// The input of a strip, column by column. `Whole`: a block of all channels, nothing to mask.
template <int V, int Rows, bool Flip, bool Whole>
struct Columns512 {
  using Row = Row512<V>;
  using Bytes = typename Row::Type;

  explicit Columns512(const DepthwiseStrip& strip)
      : strip(strip),
        offset(strip.column_offset),
        rows(strip.rows),
        mask(avx512::byte_lanes(strip.channels)),
        flip(Row::fill(0x80)) {}

  // Group g of the next column but `c`: a pass's part of it, interleaved.
  template <int Pass, int H>
  inline __attribute__((always_inline)) void read(int64_t c, int g, __m512i (&column)[H]) const {
    Bytes bytes[4];
    if (offset[c] < 0) {
      const Bytes padding = Row::fill(Flip ? strip.padding ^ 0x80 : strip.padding);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) bytes[r] = padding;
    } else {
      // What stands in for a row behind the last one meets zero weights.
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const int row = 4 * g + r;
        bytes[r] = row >= Rows ? bytes[row % 2]
                               : Row::template load_masked<Flip, Whole>(
                                     rows[row < Rows ? row : 0] + offset[c], mask, flip);
      }
    }
    Row::template interleave_part<Pass>(bytes, column);
  }

  // Read again where they are needed, as there are no registers for them.
  const DepthwiseStrip& strip;
  const int64_t* offset;  // of the next column
  const uint8_t* const* rows;
  __mmask64 mask;  // of the channels of the block
  Bytes flip;
};

// Loaded into a register; gcc would make it an operand of each instruction that reads it.
template <typename T>
QK_INLINE T once(T v) {
  asm("" : "+v"(v));
  return v;
}

// Taps columns and Rows rows, in groups of four, for Outputs rows of outputs, of which Across
// beside each other are computed together. Each pass takes H of V vectors of channels.
template <int Taps, int Rows, int Outputs, int Stride, int Across, int V, int H>
struct Window {
  static constexpr int kTaps = Taps, kRows = Rows, kOutputs = Outputs, kStride = Stride;
  static constexpr int kAcross = Across;
  static constexpr int kGroups = (Rows + 3) / 4, kColumns = Taps + (Across - 1) * Stride;
  static constexpr int kVectors = V, kTaken = H, kPasses = V / H;
  using Column = __m512i[kGroups][H];
};

// The outputs of vector `j` of a pass. The addends and factors lie behind the first sums: addressed
// from there, they leave gcc the registers that it needs.
template <typename W, int Pass>
QK_INLINE void finish_vector(const DepthwiseStrip& s,
                             const typename W::Column (&columns)[W::kColumns], int j,
                             __m512i (&sum)[W::kAcross][W::kOutputs]) {
  constexpr int V = W::kVectors;
  const int vector = Pass * W::kTaken + j;
  const __m512i init = once(_mm512_loadu_si512(s.init + 16 * vector));
#pragma GCC unroll 2
  for (int row = 0; row < W::kOutputs; ++row) {
#pragma GCC unroll 2
    for (int dx = 0; dx < W::kAcross; ++dx) sum[dx][row] = init;
  }
#pragma GCC unroll 5
  for (int tap = 0; tap < W::kTaps; ++tap) {
#pragma GCC unroll 2
    for (int g = 0; g < W::kGroups; ++g) {
#pragma GCC unroll 2
      for (int row = 0; row < W::kOutputs; ++row) {
        const int at = ((tap * W::kGroups + g) * V + vector) * W::kOutputs + row;
        const __m512i weights = once(_mm512_load_si512(s.weights + 64 * at));
#pragma GCC unroll 2
        for (int dx = 0; dx < W::kAcross; ++dx) {
          Avx512::dot(sum[dx][row], columns[tap + dx * W::kStride][g][j], weights);
        }
      }
    }
  }
  const __m512 addend = once(_mm512_loadu_ps(s.init + 16 * (V + vector)));
  const __m512 mult = once(_mm512_loadu_ps(s.init + 16 * (2 * V + vector)));
#pragma GCC unroll 2
  for (int dx = 0; dx < W::kAcross; ++dx) {
#pragma GCC unroll 2
    for (int row = 0; row < W::kOutputs; ++row) {
      sum[dx][row] = Avx512::narrow(sum[dx][row], addend, mult);
    }
  }
}

// The outputs of all vectors of a pass, as int16.
template <typename W, int Pass>
QK_INLINE void finish_pass(const DepthwiseStrip& s,
                           const typename W::Column (&columns)[W::kColumns],
                           __m512i (&pairs)[W::kAcross][W::kOutputs][W::kVectors / 2]) {
#pragma GCC unroll 2
  for (int i = 0; i < W::kTaken / 2; ++i) {
    __m512i low[W::kAcross][W::kOutputs], high[W::kAcross][W::kOutputs];
    finish_vector<W, Pass>(s, columns, 2 * i, low);
    finish_vector<W, Pass>(s, columns, 2 * i + 1, high);
#pragma GCC unroll 2
    for (int dx = 0; dx < W::kAcross; ++dx) {
#pragma GCC unroll 2
      for (int row = 0; row < W::kOutputs; ++row) {
        const int pair = Pass * W::kTaken / 2 + i;
        pairs[dx][row][pair] = _mm512_packs_epi32(low[dx][row], high[dx][row]);
      }
    }
  }
}

// Reads a column of a strip for a pass.
template <typename W, int Pass, typename Input>
QK_INLINE void read_column(const Input& input, int64_t column, typename W::Column& to) {
#pragma GCC unroll 2
  for (int g = 0; g < W::kGroups; ++g) input.template read<Pass>(column, g, to[g]);
}

template <typename W, int Pass, bool Flip, bool Whole>
static __attribute__((noinline)) void roll_avx512(const DepthwiseStrip& strip) {
  constexpr int V = W::kVectors, H = W::kTaken, kKept = W::kTaps - W::kStride;
  Columns512<V, W::kRows, Flip, Whole> input(strip);
  const bool bare = is_bare(strip);
  uint8_t *out = strip.out[0], *below = strip.out[1];
  int64_t step_below = W::kOutputs == 2 ? strip.out_step : 0;
  if (W::kOutputs == 2 && below == nullptr) {  // an odd number of rows: computed for nothing
    below = strip.scratch + 2 * 64 * strip.outputs;
    step_below = 0;
  }
  typename W::Column columns[W::kColumns] = {};
#pragma GCC unroll 4
  for (int k = 0; k < kKept; ++k) read_column<W, Pass>(input, k, columns[k]);
  input.offset += kKept;
  for (int64_t x = 0; x < strip.outputs; x += W::kAcross) {
#pragma GCC unroll 4
    for (int k = kKept; k < W::kColumns; ++k) {
      if (k < W::kTaps || x + 1 < strip.outputs) read_column<W, Pass>(input, k - kKept, columns[k]);
    }
    input.offset += W::kAcross * W::kStride;
    __m512i pairs[W::kAcross][W::kOutputs][V / 2];
    finish_pass<W, Pass>(strip, columns, pairs);
#pragma GCC unroll 2
    for (int dx = 0; dx < W::kAcross; ++dx) {
      if (dx == 1 && x + 1 == strip.outputs) break;
#pragma GCC unroll 2
      for (int row = 0; row < W::kOutputs; ++row) {
        uint8_t* const part = strip.scratch + 64 * (W::kOutputs * (x + dx) + row);
        if constexpr (Pass + 1 < W::kPasses) {
          _mm512_store_si512(part, pairs[dx][row][0]);
        } else {
          if constexpr (Pass > 0) pairs[dx][row][0] = _mm512_load_si512(part);
          Row512<V>::template store_masked<Whole>(
              row == 0 ? out + dx * strip.out_step : below + dx * step_below, input.mask,
              Avx512::pack_bytes<V>(pairs[dx][row], strip, bare));
        }
      }
    }
    out += W::kAcross * strip.out_step;
    below += W::kAcross * step_below;
#pragma GCC unroll 4
    for (int k = 0; k < kKept; ++k) {
#pragma GCC unroll 2
      for (int g = 0; g < W::kGroups; ++g) {
#pragma GCC unroll 4
        for (int j = 0; j < H; ++j) columns[k][g][j] = columns[k + W::kAcross * W::kStride][g][j];
      }
    }
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

template <int V>
QK_INLINE void depthwise_block(const DepthwiseStrip& s) {
  if (s.tap_step == 1 && s.quads == 0 && s.out_group == 1 && s.acc == nullptr) {
    const int64_t taps = s.taps, window = s.window, rows = s.rows_out, step = s.column_step;
    if (taps == 3 && s.row_groups == 1) {
      if (rows == 2 && step == 1) return roll<Window<3, 4, 2, 1, 2, V, V>>(s);
      if (window == 3 && rows == 1 && step == 2) return roll<Window<3, 3, 1, 2, 2, V, V>>(s);
    }
    if (taps == 5 && s.row_groups == 2 && rows == 2) {
      if (window == 6 && step == 1) return roll<Window<5, 6, 2, 1, 2, V, 2>>(s);
      if (window == 7 && step == 2) return roll<Window<5, 7, 2, 2, 1, V, 2>>(s);
    }
  }
  block<Avx512, V>(s);
}
