// The loops of the depthwise kernels, shared by the x86 files. Include it inside the target region
// of a kernel file, inside its anonymous namespace, so that it is compiled for that target.
//
// A Kernel has
//   kLanes, kVectorBytes: dwords in a vector; its bytes, as weights and in the scratch: AVX2 keeps
//     the four channels of a narrow group as int16
//   kColumns: output columns computed together, of three taps beside each other; twice as many are
//     where one row has other taps
//   kPairColumns: the same of two rows
//   kUnrolls: whether a column has so little to do for a dword that the loop over them is unrolled
//   kForGroups, kForChannels: whether it is for narrow groups, for depthwise layers
//   kDwordRows: for depthwise layers, the input rows of a channel in a dword
//   kHoldsTaps: registers hold the weights of three taps beside the sums
//   Vector, Activations, Weights: an int32 vector; interleaved input, weights, in registers
//   load, load_floats, store: of a Vector or as many floats
//   load_activations, load_weights, dot(acc, activations, weights)
//   permute(pixel, order), store_dwords(scratch, permuted)
//   narrow(acc, addend, mult): RNE((float(acc) + addend) * mult), int32
//   Row<V>: V vectors of channels as bytes: load, fill, interleave
//   pack(q0, q1): int32 -> int16, saturating
//   store_bytes<V, Bare>(pairs, strip, out): + zero point, int16 -> uint8, clamp; natural order

// The first n <= N output channels of a block: each input channel `multiplier` times, the first one
// `phase` times less.
template <int N>
QK_INLINE void expand_channels(const uint8_t* row, int64_t phase, int64_t multiplier, int64_t n,
                               uint8_t* dst) {
  if (multiplier == 2 && n == N) {  // the phase is 0: blocks are even
    for (int i = 0; i < N; i += 16) {
      const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + i / 2));
      _mm_store_si128(reinterpret_cast<__m128i*>(dst + i), _mm_unpacklo_epi8(v, v));
    }
    return;
  }
  for (int64_t i = 0; i < n; ++row, phase = 0) {
    for (int64_t k = phase; k < multiplier && i < n; ++k) dst[i++] = *row;
  }
}

// Copies n < 32 bytes without reading or writing further.
QK_INLINE void copy_bytes(uint8_t* dst, const uint8_t* src, int64_t n) {
  if (n & 16) __builtin_memcpy(dst, src, 16), dst += 16, src += 16;
  if (n & 8) __builtin_memcpy(dst, src, 8), dst += 8, src += 8;
  if (n & 4) __builtin_memcpy(dst, src, 4), dst += 4, src += 4;
  if (n & 2) __builtin_memcpy(dst, src, 2), dst += 2, src += 2;
  if (n & 1) *dst = *src;
}

// Columns [begin, end) of the strip's input, interleaved: [strip_columns][row_groups][channels of
// the block][kDwordRows].
template <typename Kernel, bool Flip, bool Expand, int V>
QK_INLINE void interleave_columns(const DepthwiseStrip& strip, int64_t begin, int64_t end) {
  using Row = typename Kernel::template Row<V>;
  constexpr int kRows = Kernel::kDwordRows;
  constexpr int64_t kGroupBytes = V * Kernel::kLanes * 4;
  const DepthwiseStrip s = strip;
  const auto flip = Row::fill(0x80), padding = Row::fill(Flip ? s.padding ^ 0x80 : s.padding);
  alignas(64) uint8_t expanded[V * Kernel::kLanes];
  for (int64_t group = 0; group < s.row_groups; ++group) {
    const uint8_t* const* rows = s.rows + group * kRows;
    uint8_t* dst = s.scratch + (begin * s.row_groups + group) * kGroupBytes;
    for (int64_t column = begin; column < end; ++column) {
      const int64_t offset = s.column_offset[column];
      typename Row::Type bytes[kRows];
      if (offset < 0) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) bytes[r] = padding;
      } else {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const uint8_t* pixel = rows[r] + offset;
          if constexpr (Expand) {
            expand_channels<V * Kernel::kLanes>(pixel, s.channel_phase, s.out_group, s.channels,
                                                expanded);
            pixel = expanded;
          }
          bytes[r] = Row::template load<Flip>(pixel, s.channels, flip);
        }
      }
      Row::interleave(bytes, dst);
      dst += s.row_groups * kGroupBytes;
    }
  }
}

// The same for narrow groups of Quads times four channels: [strip_columns][rows][quads][channels of
// the block][4 channels of the lane's group]. The orders of the permutations stay in registers: a
// load waits for each of the many stores before it that lies as far behind a multiple of 4 KiB.
template <typename Kernel, bool Flip, int V, int Quads>
QK_INLINE void spread_columns(const DepthwiseStrip& strip, int64_t begin, int64_t end) {
  const DepthwiseStrip s = strip;
  using Row = typename Kernel::template Row<4>;  // a block's input is no wider than its output
  const auto padding = Row::fill(Flip ? s.padding ^ 0x80 : s.padding), flip = Row::fill(0x80);
  const int64_t bytes = s.channels / s.out_group * s.in_group;
  typename Kernel::Vector order[Quads * V];
#pragma GCC unroll 16
  for (int i = 0; i < Quads * V; ++i) order[i] = Kernel::load(s.order + i * Kernel::kLanes);
  constexpr int64_t kRowBytes = Quads * V * Kernel::kVectorBytes;
  uint8_t* dst = s.scratch + begin * s.input_rows * kRowBytes;
  for (int64_t column = begin; column < end; ++column) {
    const int64_t offset = s.column_offset[column];
    for (int64_t r = s.known_rows; r < s.input_rows; ++r) {
      const auto pixel =
          offset < 0 ? padding : Row::template load<Flip>(s.rows[r] + offset, bytes, flip);
      const int64_t place = s.turn + r;
      uint8_t* row = dst + (place < s.input_rows ? place : place - s.input_rows) * kRowBytes;
#pragma GCC unroll 16
      for (int i = 0; i < Quads * V; ++i) {
        Kernel::store_dwords(row + i * Kernel::kVectorBytes, Kernel::permute(pixel, order[i]));
      }
    }
    dst += s.input_rows * kRowBytes;
  }
}

template <typename Kernel, bool Flip, int V>
QK_INLINE void spread(const DepthwiseStrip& s, int64_t begin, int64_t end) {
  switch (s.quads) {
    case 1:
      return spread_columns<Kernel, Flip, V, 1>(s, begin, end);
    case 2:
      return spread_columns<Kernel, Flip, V, 2>(s, begin, end);
    case 3:
      return spread_columns<Kernel, Flip, V, 3>(s, begin, end);
    default:
      return spread_columns<Kernel, Flip, V, 4>(s, begin, end);
  }
}

template <typename Kernel, int V>
QK_INLINE void interleave(const DepthwiseStrip& s, int64_t begin, int64_t end) {
  if (s.out_group > 1) {
    s.input_flip == 0 ? interleave_columns<Kernel, false, true, V>(s, begin, end)
                      : interleave_columns<Kernel, true, true, V>(s, begin, end);
  } else {
    s.input_flip == 0 ? interleave_columns<Kernel, false, false, V>(s, begin, end)
                      : interleave_columns<Kernel, true, false, V>(s, begin, end);
  }
}

template <typename Kernel, int V>
static __attribute__((noinline)) void fill_scratch(const DepthwiseStrip& s, int64_t begin,
                                                   int64_t end) {
  if constexpr (Kernel::kForGroups) {
    if (s.quads > 0) {
      return s.input_flip == 0 ? spread<Kernel, false, V>(s, begin, end)
                               : spread<Kernel, true, V>(s, begin, end);
    }
  }
  if constexpr (Kernel::kForChannels) interleave<Kernel, V>(s, begin, end);
}

// One dword of each of T columns, for P rows.
template <typename Kernel, int T, int P>
QK_INLINE void add_dword(const uint8_t* b, int64_t step, const int8_t* w,
                         typename Kernel::Vector (&acc)[T][P]) {
  typename Kernel::Weights weights[P];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) weights[p] = Kernel::load_weights(w + p * Kernel::kVectorBytes);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const auto activations = Kernel::load_activations(b + t * step);
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) Kernel::dot(acc[t][p], activations, weights[p]);
  }
}

// The accumulators of T columns and P rows, for vector `j` of the block. The dwords of a column
// and, without dilation, of its taps lie one after the other, like the weights: one loop.
template <typename Kernel, int V, int T, int P>
QK_INLINE void accumulate(const DepthwiseStrip& s, int64_t x, int j,
                          typename Kernel::Vector (&acc)[T][P]) {
  constexpr int64_t kVectorBytes = Kernel::kVectorBytes, kGroupBytes = V * kVectorBytes;
  constexpr int64_t kStepWeights = P * kGroupBytes;
  const auto init = Kernel::load(s.init + j * Kernel::kLanes);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) acc[t][p] = init;
  }
  const int64_t column_bytes = s.row_groups * kGroupBytes, step = s.column_step * column_bytes;
  const bool flat = s.tap_step == 1;
  const int64_t runs = flat ? 1 : s.taps;
  const int64_t steps = flat ? s.taps * s.row_groups : s.row_groups;
  const uint8_t* run_bytes = s.scratch + x * step + j * kVectorBytes;
  const int8_t* w = s.weights + j * P * Kernel::kVectorBytes;
  for (int64_t run = 0; run < runs; ++run) {
    const uint8_t* b = run_bytes;
    if constexpr (Kernel::kUnrolls) {
#pragma GCC unroll 3
      for (int64_t i = 0; i < steps; ++i, b += kGroupBytes, w += kStepWeights) {
        add_dword<Kernel, T, P>(b, step, w, acc);
      }
    } else {
      for (int64_t i = 0; i < steps; ++i, b += kGroupBytes, w += kStepWeights) {
        add_dword<Kernel, T, P>(b, step, w, acc);
      }
    }
    run_bytes += s.tap_step * column_bytes;
  }
}

// `accumulate` as a function of its own, on memory: among what columns() holds for two rows of four
// vectors gcc finds no registers for it, and keeps weights on the stack.
template <typename Kernel, int V, int T, int P>
static __attribute__((noinline)) void accumulate_apart(const DepthwiseStrip& s, int64_t x, int j,
                                                       typename Kernel::Vector (&result)[T][P]) {
  typename Kernel::Vector acc[T][P];
  accumulate<Kernel, V, T, P>(s, x, j, acc);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) result[t][p] = acc[t][p];
  }
}

// The accumulators of T columns of one row with three taps beside each other, for J vectors of the
// block from `j` on: a column is loaded once for the three outputs that it belongs to.
template <typename Kernel, int V, int J, int T>
QK_INLINE void accumulate_three_taps(const DepthwiseStrip& s, int64_t x, int j,
                                     typename Kernel::Vector (&acc)[J][T][1]) {
  constexpr int64_t kVectorBytes = Kernel::kVectorBytes, kGroupBytes = V * kVectorBytes;
  const int64_t groups = s.row_groups, column_bytes = groups * kGroupBytes;
  const int64_t tap_weights = groups * V * Kernel::kVectorBytes;
#pragma GCC unroll 2
  for (int i = 0; i < J; ++i) {
    const auto init = Kernel::load(s.init + (j + i) * Kernel::kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[i][t][0] = init;
  }
  const uint8_t* b = s.scratch + x * column_bytes + j * kVectorBytes;
  // In the order of the places; the first of the input rows lies in place `turn`.
  const int64_t first = s.turn * s.quads;
  const int8_t* const top = s.weights + j * Kernel::kVectorBytes;
  const int8_t* w = top + (groups - first) * V * Kernel::kVectorBytes;
  for (int64_t group = 0; group < groups; ++group) {
    if (group == first) w = top;
#pragma GCC unroll 2
    for (int i = 0; i < J; ++i) {
      typename Kernel::Weights weights[3];
#pragma GCC unroll 3
      for (int tap = 0; tap < 3; ++tap) {
        weights[tap] = Kernel::load_weights(w + tap * tap_weights + i * Kernel::kVectorBytes);
      }
      const uint8_t* column = b + i * kVectorBytes;
#pragma GCC unroll 10
      for (int c = 0; c < T + 2; ++c) {
        const auto activations = Kernel::load_activations(column);
#pragma GCC unroll 3
        for (int tap = 0; tap < 3; ++tap) {
          const int t = c - tap;
          if (t >= 0 && t < T) Kernel::dot(acc[i][t < 0 ? 0 : t][0], activations, weights[tap]);
        }
        column += column_bytes;
      }
    }
    b += kGroupBytes;
    w += V * Kernel::kVectorBytes;
  }
}

template <typename Kernel, int V, int T, int P>
QK_INLINE void narrow(const DepthwiseStrip& s, int j, typename Kernel::Vector (&acc)[T][P]) {
  const auto addend = Kernel::load_floats(s.addend + j * Kernel::kLanes);
  const auto mult = Kernel::load_floats(s.mult + j * Kernel::kLanes);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) acc[t][p] = Kernel::narrow(acc[t][p], addend, mult);
  }
}

constexpr int64_t kFillColumns = 16;

// What becomes of the accumulators: stored as they are, uint8 over its whole range without a zero
// point, or any 8 bits.
enum class Finish { kAccumulators, kBare, kClamped };

QK_INLINE bool is_bare(const DepthwiseStrip& s) {
  return s.zero_point == 0 && s.output_flip == 0 && s.qmin == 0 && s.qmax == 255;
}

// T columns x P rows x the whole block. `ThreeTaps`: one row, taps and columns beside each other.
template <typename Kernel, Finish F, int V, int T, int P, bool ThreeTaps>
QK_INLINE void columns(const DepthwiseStrip& s, int64_t x) {
  using Vector = typename Kernel::Vector;
  if constexpr (F == Finish::kAccumulators) {
    for (int j = 0; j < V; ++j) {
      Vector acc[1][T][P];
      if constexpr (ThreeTaps) {
        accumulate_three_taps<Kernel, V, 1, T>(s, x, j, acc);
      } else {
        accumulate<Kernel, V, T, P>(s, x, j, acc[0]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          Kernel::store(s.acc + (((x + t) * P + p) * V + j) * Kernel::kLanes, acc[0][t][p]);
        }
      }
    }
  } else {
    constexpr int kPairs = (V + 1) / 2, kBoth = V > 1 ? 2 : 1;
    Vector pairs[T][P][kPairs];
#pragma GCC unroll 2
    for (int pair = 0; pair < kPairs; ++pair) {
      Vector acc[kBoth][T][P];
      if constexpr (ThreeTaps) {
        accumulate_three_taps<Kernel, V, kBoth, T>(s, x, 2 * pair, acc);
      }
#pragma GCC unroll 2
      for (int i = 0; i < kBoth; ++i) {
        if constexpr (P == 2 && T * V * Kernel::kLanes > 128) {
          accumulate_apart<Kernel, V, T, P>(s, x, 2 * pair + i, acc[i]);
        } else if constexpr (!ThreeTaps) {
          accumulate<Kernel, V, T, P>(s, x, 2 * pair + i, acc[i]);
        }
        narrow<Kernel, V, T, P>(s, 2 * pair + i, acc[i]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          pairs[t][p][pair] = Kernel::pack(acc[0][t][p], acc[kBoth - 1][t][p]);
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      if (p > 0 && s.out[p] == nullptr) continue;
      uint8_t* out = s.out[p] + x * s.out_step;
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        Kernel::template store_bytes<V, F == Finish::kBare>(pairs[t][p], s, out);
        out += s.out_step;
      }
    }
  }
}

// The scratch is filled kFillColumns ahead of its use at most: the shuffles of the next columns
// then run beside the dot products of these, and the loop over columns starts rarely. A function of
// its own for each variant, on its own copy of the strip: in one large function gcc keeps the
// addresses on the stack.
template <typename Kernel, Finish F, int V, int P, bool ThreeTaps>
static __attribute__((noinline)) void all_columns(const DepthwiseStrip& strip) {
  const DepthwiseStrip s = strip;
  const int64_t reach = (s.taps - 1) * s.tap_step + 1;
  constexpr int kColumns = ThreeTaps ? Kernel::kColumns
                           : P == 1  ? Kernel::kColumns * 2
                                     : Kernel::kPairColumns;
  int64_t filled = 0, x = 0;
  for (; x + kColumns <= s.outputs; x += kColumns) {
    const int64_t needed = (x + kColumns - 1) * s.column_step + reach;
    if (needed > filled) {
      const int64_t more = filled + kFillColumns > needed ? filled + kFillColumns : needed;
      const int64_t end = more < s.strip_columns ? more : s.strip_columns;
      fill_scratch<Kernel, V>(strip, filled, end);
      filled = end;
    }
    columns<Kernel, F, V, kColumns, P, ThreeTaps>(s, x);
  }
  if (x < s.outputs) fill_scratch<Kernel, V>(strip, filled, s.strip_columns);
  if (x + kColumns / 2 <= s.outputs) {
    columns<Kernel, F, V, kColumns / 2, P, ThreeTaps>(s, x);
    x += kColumns / 2;
  }
  for (; x < s.outputs; ++x) columns<Kernel, F, V, 1, P, ThreeTaps>(s, x);
}

template <typename Kernel, int V, int P, bool ThreeTaps>
QK_INLINE void block_rows(const DepthwiseStrip& s) {
  if (s.acc != nullptr) {
    all_columns<Kernel, Finish::kAccumulators, V, P, ThreeTaps>(s);
  } else if (is_bare(s)) {
    all_columns<Kernel, Finish::kBare, V, P, ThreeTaps>(s);
  } else {
    all_columns<Kernel, Finish::kClamped, V, P, ThreeTaps>(s);
  }
}

template <typename Kernel, int V>
QK_INLINE void block(const DepthwiseStrip& s) {
  if constexpr (Kernel::kForChannels) {
    if (s.rows_out == 2) return block_rows<Kernel, V, 2, false>(s);
  }
  if constexpr (Kernel::kHoldsTaps) {
    if (s.taps == 3 && s.tap_step == 1 && s.column_step == 1) {
      return block_rows<Kernel, V, 1, true>(s);
    }
  }
  block_rows<Kernel, V, 1, false>(s);
}
