// The loops of the depthwise kernels, shared by the x86 files. Include it inside the target region
// of a kernel file, inside its anonymous namespace, so that it is compiled for that target.
//
// A Kernel has
//   kLanes, kColumns                 dwords in a vector; output columns computed together
//   Vector, Activations, Weights     an int32 vector; interleaved input bytes, weights, in
//   registers load_activations, load_weights, dot(acc, activations, weights) narrow(acc, addend,
//   mult)        RNE((float(acc) + addend) * mult), int32 Row<V>                           16-byte
//   chunks of V vectors of channels: load, fill, interleave pack(q0, q1)                     int32
//   -> int16, saturating store<V>(pairs, strip, out)      + zero point, int16 -> uint8, clamp;
//   natural channel order

// The first n <= N output channels of a block: each input channel `multiplier` times, the first one
// `phase` times less.
template <int N>
QK_INLINE void expand_channels(const uint8_t* row, int64_t phase, int64_t multiplier, int64_t n,
                               uint8_t* dst) {
  if (multiplier == 2 && n == N) {  // the phase is 0: blocks are even
    for (int i = 0; i < N / 2; ++i) dst[2 * i] = dst[2 * i + 1] = row[i];
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

// The strip's input, interleaved: [strip_columns][row_groups][channels of the block][4 rows].
template <typename Kernel, bool Flip, int V>
QK_INLINE void interleave_strip(const DepthwiseStrip& s) {
  using Row = typename Kernel::template Row<V>;
  const auto padding = Row::fill(Flip ? s.padding ^ 0x80 : s.padding), flip = Row::fill(0x80);
  alignas(64) uint8_t expanded[V * Kernel::kLanes];
  uint8_t* dst = s.scratch;
  for (int64_t column = 0; column < s.strip_columns; ++column) {
    const int64_t offset = s.column_offset[column];
    const uint8_t* const* rows = s.rows;
    for (int64_t group = 0; group < s.row_groups; ++group, rows += 4) {
      typename Row::Type bytes[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        if (offset < 0 || rows[r] == nullptr) {
          bytes[r] = padding;
        } else if (s.out_group == 1) {
          bytes[r] = Row::template load<Flip>(rows[r] + offset, s.channels, flip);
        } else {
          expand_channels<V * Kernel::kLanes>(rows[r] + offset, s.channel_phase, s.out_group,
                                              s.channels, expanded);
          bytes[r] = Row::template load<Flip>(expanded, s.channels, flip);
        }
      }
      Row::interleave(bytes, dst);
      dst += V * Kernel::kLanes * 4;
    }
  }
}

// The strip's input of narrow groups: [strip_columns][rows][quads][channels of the block][4
// channels of the lane's group].
template <typename Kernel, bool Flip, int V>
QK_INLINE void spread_strip(const DepthwiseStrip& s) {
  using Row = typename Kernel::template Row<4>;  // a block's input is no wider than its output
  const auto padding = Row::fill(Flip ? s.padding ^ 0x80 : s.padding), flip = Row::fill(0x80);
  const int64_t bytes = s.channels / s.out_group * s.in_group;
  uint8_t* dst = s.scratch;
  for (int64_t column = 0; column < s.strip_columns; ++column) {
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

// The accumulators of T columns and P rows, for vector `j` of the block.
template <typename Kernel, int V, int T, int P>
QK_INLINE void accumulate(const DepthwiseStrip& s, int64_t x, int j,
                          typename Kernel::Vector (&acc)[T][P]) {
  constexpr int64_t kVectorBytes = Kernel::kLanes * 4;
  const auto init = Kernel::load(s.init + j * Kernel::kLanes);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) acc[t][p] = init;
  }
  const int64_t group_bytes = V * kVectorBytes, column_bytes = s.row_groups * group_bytes;
  const int64_t step = s.column_step * column_bytes;
  const uint8_t* tap_bytes = s.scratch + x * step + j * kVectorBytes;
  const int8_t* w = s.weights + j * P * Kernel::kWeightBytes;
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    const uint8_t* b = tap_bytes;
    for (int64_t group = 0; group < s.row_groups; ++group) {
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
      b += group_bytes;
      w += V * P * Kernel::kWeightBytes;
    }
    tap_bytes += s.tap_step * column_bytes;
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

// T columns x P rows x the whole block.
// `Plain`: the output is uint8 without a narrower clamp.
template <typename Kernel, bool Plain, int V, int T, int P>
QK_INLINE void columns(const DepthwiseStrip& s, int64_t x) {
  using Vector = typename Kernel::Vector;
  if (s.acc != nullptr) {
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
    return;
  }
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
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      if (s.out[p] == nullptr) continue;
      Kernel::template store_bytes<V, Plain>(pairs[t][p], s, s.out[p] + (x + t) * s.out_step);
    }
  }
}

template <typename Kernel, bool Plain, int V, int P>
QK_INLINE void all_columns(const DepthwiseStrip& s) {
  int64_t x = 0;
  for (; x + Kernel::kColumns <= s.outputs; x += Kernel::kColumns) {
    columns<Kernel, Plain, V, Kernel::kColumns, P>(s, x);
  }
  for (; x < s.outputs; ++x) columns<Kernel, Plain, V, 1, P>(s, x);
}

template <typename Kernel, int V>
QK_INLINE void block(const DepthwiseStrip& s) {
  if (s.quads > 0) {
    s.input_flip == 0 ? spread_strip<Kernel, false, V>(s) : spread_strip<Kernel, true, V>(s);
  } else {
    s.input_flip == 0 ? interleave_strip<Kernel, false, V>(s)
                      : interleave_strip<Kernel, true, V>(s);
  }
  const bool plain = s.output_flip == 0 && s.qmin == 0 && s.qmax == 255;
  if (s.rows_out == 2) {
    plain ? all_columns<Kernel, true, V, 2>(s) : all_columns<Kernel, false, V, 2>(s);
  } else {
    plain ? all_columns<Kernel, true, V, 1>(s) : all_columns<Kernel, false, V, 1>(s);
  }
}
