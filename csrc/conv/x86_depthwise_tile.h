// The loops of the depthwise kernels, shared by the x86 files. Include it inside the target region
// of a kernel file, inside its anonymous namespace, so that it is compiled for that target.
//
// A Kernel has
//   kLanes, kColumns                 dwords in a vector; output columns computed together
//   Vector, Activations, Weights     an int32 vector; interleaved input bytes, weights, in
//   registers load_activations, load_weights, dot(acc, activations, weights) narrow(acc, addend,
//   mult)        RNE((float(acc) + addend) * mult), int32 Row<V>                           16-byte
//   chunks of V vectors of channels: load, fill, store, interleave pack(q0, q1) int32
//   -> int16, saturating store<V>(pairs, strip, out)      + zero point, int16 -> uint8, clamp;
//   natural channel order

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
// the block][4 rows].
template <typename Kernel, bool Flip, bool Expand, int V>
QK_INLINE void interleave_columns(const DepthwiseStrip& strip, int64_t begin, int64_t end) {
  using Row = typename Kernel::template Row<V>;
  constexpr int64_t kGroupBytes = V * Kernel::kLanes * 4;
  const DepthwiseStrip s = strip;
  const auto flip = Row::fill(0x80), padding = Row::fill(s.padding);
  const auto flipped_padding = Row::fill(Flip ? s.padding ^ 0x80 : s.padding);
  // A row outside of the image is read from here, at offset 0.
  alignas(64) uint8_t padding_row[V * Kernel::kLanes], expanded[V * Kernel::kLanes];
  Row::store(padding_row, padding);
  for (int64_t group = 0; group < s.row_groups; ++group) {
    const uint8_t* rows[4];
    int64_t inside[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const uint8_t* row = s.rows[group * 4 + r];
      rows[r] = row == nullptr ? padding_row : row;
      inside[r] = row == nullptr ? 0 : -1;
    }
    uint8_t* dst = s.scratch + (begin * s.row_groups + group) * kGroupBytes;
    for (int64_t column = begin; column < end; ++column) {
      const int64_t offset = s.column_offset[column];
      typename Row::Type bytes[4];
      if (offset < 0) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) bytes[r] = flipped_padding;
      } else {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const uint8_t* pixel = rows[r] + (offset & inside[r]);
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

// The same for narrow groups: [strip_columns][rows][quads][channels of the block][4 channels of the
// lane's group].
template <typename Kernel, bool Flip, int V>
QK_INLINE void spread_columns(const DepthwiseStrip& strip, int64_t begin, int64_t end) {
  const DepthwiseStrip s = strip;
  using Row = typename Kernel::template Row<4>;  // a block's input is no wider than its output
  const auto padding = Row::fill(Flip ? s.padding ^ 0x80 : s.padding), flip = Row::fill(0x80);
  const int64_t bytes = s.channels / s.out_group * s.in_group;
  uint8_t* dst = s.scratch + begin * s.row_groups * V * Kernel::kLanes * 4;
  for (int64_t column = begin; column < end; ++column) {
    const int64_t offset = s.column_offset[column];
    for (int64_t r = 0; r < s.input_rows; ++r) {
      const auto pixel = offset < 0 || s.rows[r] == nullptr
                             ? padding
                             : Row::template load<Flip>(s.rows[r] + offset, bytes, flip);
      const int32_t* order = s.order;
      for (int64_t i = 0; i < s.quads * V; ++i) {
        Kernel::store(reinterpret_cast<int32_t*>(dst), Kernel::permute(pixel, Kernel::load(order)));
        order += Kernel::kLanes;
        dst += Kernel::kLanes * 4;
      }
    }
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
  if (s.quads > 0) {
    s.input_flip == 0 ? spread_columns<Kernel, false, V>(s, begin, end)
                      : spread_columns<Kernel, true, V>(s, begin, end);
  } else {
    interleave<Kernel, V>(s, begin, end);
  }
}

// The accumulators of T columns and P rows, for vector `j` of the block. The dwords of a column
// and, without dilation, of its taps lie one after the other, like the weights: one loop.
template <typename Kernel, int V, int T, int P>
QK_INLINE void accumulate(const DepthwiseStrip& s, int64_t x, int j,
                          typename Kernel::Vector (&acc)[T][P]) {
  constexpr int64_t kVectorBytes = Kernel::kLanes * 4, kGroupBytes = V * kVectorBytes;
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
  const int8_t* w = s.weights + j * P * Kernel::kWeightBytes;
  for (int64_t run = 0; run < runs; ++run) {
    const uint8_t* b = run_bytes;
    for (int64_t i = 0; i < steps; ++i) {
      typename Kernel::Weights weights[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        weights[p] = Kernel::load_weights(w + p * Kernel::kWeightBytes);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const auto activations = Kernel::load_activations(b + t * step);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) Kernel::dot(acc[t][p], activations, weights[p]);
      }
      b += kGroupBytes;
      w += V * P * Kernel::kWeightBytes;
    }
    run_bytes += s.tap_step * column_bytes;
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

// What becomes of the accumulators: stored as they are, uint8 over its whole range, or any 8 bits.
enum class Finish { kAccumulators, kPlain, kClamped };

// T columns x P rows x the whole block.
template <typename Kernel, Finish F, int V, int T, int P>
QK_INLINE void columns(const DepthwiseStrip& s, int64_t x) {
  using Vector = typename Kernel::Vector;
  if constexpr (F == Finish::kAccumulators) {
    for (int j = 0; j < V; ++j) {
      Vector acc[T][P];
      accumulate<Kernel, V, T, P>(s, x, j, acc);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          Kernel::store(s.acc + (((x + t) * P + p) * V + j) * Kernel::kLanes, acc[t][p]);
        }
      }
    }
  } else {
    constexpr int kPairs = (V + 1) / 2;
    Vector pairs[T][P][kPairs];
#pragma GCC unroll 2
    for (int pair = 0; pair < kPairs; ++pair) {
      Vector first[T][P], second[T][P];
      accumulate<Kernel, V, T, P>(s, x, 2 * pair, first);
      narrow<Kernel, V, T, P>(s, 2 * pair, first);
      if constexpr (V > 1) {
        accumulate<Kernel, V, T, P>(s, x, 2 * pair + 1, second);
        narrow<Kernel, V, T, P>(s, 2 * pair + 1, second);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          pairs[t][p][pair] = Kernel::pack(first[t][p], V > 1 ? second[t][p] : first[t][p]);
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      if (p > 0 && s.out[p] == nullptr) continue;
      uint8_t* out = s.out[p] + x * s.out_step;
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        Kernel::template store_bytes<V, F == Finish::kPlain>(pairs[t][p], s, out);
        out += s.out_step;
      }
    }
  }
}

// The scratch is filled kFillColumns ahead of its use at most: the shuffles of the next columns
// then run beside the dot products of these, and the loop over columns starts rarely. A function of
// its own for each variant, on its own copy of the strip: in one large function gcc keeps the
// addresses on the stack.
template <typename Kernel, Finish F, int V, int P>
static __attribute__((noinline)) void all_columns(const DepthwiseStrip& strip) {
  const DepthwiseStrip s = strip;
  const int64_t reach = (s.taps - 1) * s.tap_step + 1;
  int64_t filled = 0, x = 0;
  for (; x + Kernel::kColumns <= s.outputs; x += Kernel::kColumns) {
    const int64_t needed = (x + Kernel::kColumns - 1) * s.column_step + reach;
    if (needed > filled) {
      const int64_t more = filled + kFillColumns > needed ? filled + kFillColumns : needed;
      const int64_t end = more < s.strip_columns ? more : s.strip_columns;
      fill_scratch<Kernel, V>(strip, filled, end);
      filled = end;
    }
    columns<Kernel, F, V, Kernel::kColumns, P>(s, x);
  }
  if (x < s.outputs) fill_scratch<Kernel, V>(strip, filled, s.strip_columns);
  for (; x < s.outputs; ++x) columns<Kernel, F, V, 1, P>(s, x);
}

template <typename Kernel, int V, int P>
QK_INLINE void block_rows(const DepthwiseStrip& s) {
  const bool plain = s.output_flip == 0 && s.qmin == 0 && s.qmax == 255;
  if (s.acc != nullptr) {
    all_columns<Kernel, Finish::kAccumulators, V, P>(s);
  } else if (plain) {
    all_columns<Kernel, Finish::kPlain, V, P>(s);
  } else {
    all_columns<Kernel, Finish::kClamped, V, P>(s);
  }
}

template <typename Kernel, int V>
QK_INLINE void block(const DepthwiseStrip& s) {
  if (s.rows_out == 2) {
    block_rows<Kernel, V, 2>(s);
  } else {
    block_rows<Kernel, V, 1>(s);
  }
}
