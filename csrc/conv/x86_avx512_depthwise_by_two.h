// Depthwise with three taps a row and stride 2, without a scratch strip. Include it in
// x86_avx512vnni.cc, inside its anonymous namespace, after struct Avx512.
//
// Trick: an output has three columns of four interleaved rows, and its last column is the first of
//   the next output: it stays in registers, and nothing is stored but outputs. With stride 1 a
//   scratch strip serves three taps of two rows, and is as fast.
// Numbers, memory: as depthwise.h.

// acc += a * the vector `Offset` bytes behind `weights`. Spelled out, as gcc would keep the address
// of each vector on the stack.
template <int Offset>
QK_INLINE void dot_at(__m512i& acc, __m512i a, const int8_t* weights) {
  asm("vpdpbusd %c3(%2), %1, %0" : "+v"(acc) : "v"(a), "r"(weights), "i"(Offset), "m"(*weights));
}

// The input of a strip, column by column. A row outside of the image is read from `padding_row`.
template <int V, bool Flip>
struct Columns512 {
  using Row = Row512<V>;

  explicit Columns512(const DepthwiseStrip& s)
      : offsets(s.column_offset),
        mask(first_bytes(s.channels)),
        whole(s.channels == 16 * V),
        flip(Row::fill(0x80)),
        padding(Row::fill(Flip ? s.padding ^ 0x80 : s.padding)) {
    Row::store(padding_row, Row::fill(s.padding));
    for (int r = 0; r < 4; ++r) {
      rows[r] = s.rows[r] == nullptr ? padding_row : s.rows[r];
      inside[r] = s.rows[r] == nullptr ? 0 : -1;
      if (r < 3) whole = whole && s.rows[r] != nullptr;
    }
  }

  // Column `c`, interleaved.
  inline __attribute__((always_inline)) void read(int64_t c, __m512i (&column)[V]) const {
    const int64_t offset = offsets[c];
    typename Row::Type bytes[4];
    if (offset < 0) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) bytes[r] = padding;
    } else if (whole) {
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) bytes[r] = Row::template load_all<Flip>(rows[r] + offset, flip);
      bytes[3] = inside[3] == 0 ? padding : Row::template load_all<Flip>(rows[3] + offset, flip);
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        bytes[r] = Row::template load_some<Flip>(rows[r] + (offset & inside[r]), mask, flip);
      }
    }
    Row::interleave(bytes, column);
  }

  const int64_t* offsets;
  __mmask64 mask;  // of the channels of the block
  bool whole;      // nothing to mask, none of the first three rows outside
  typename Row::Type flip, padding;
  const uint8_t* rows[4];
  int64_t inside[4];
  alignas(64) uint8_t padding_row[16 * V];
};

// Stores V vectors of accumulators as 16 * V bytes.
template <int V>
QK_INLINE void finish_column(const DepthwiseStrip& s, bool plain, const __m512i (&acc)[V],
                             uint8_t* out) {
  __m512i q[V], pairs[V / 2];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    q[j] = Avx512::narrow(acc[j], _mm512_loadu_ps(s.addend + 16 * j),
                          _mm512_loadu_ps(s.mult + 16 * j));
  }
#pragma GCC unroll 2
  for (int i = 0; i < V / 2; ++i) pairs[i] = _mm512_packs_epi32(q[2 * i], q[2 * i + 1]);
  plain ? Avx512::store_bytes<V, true>(pairs, s, out)
        : Avx512::store_bytes<V, false>(pairs, s, out);
}

// Vector J of the three columns of an output.
template <int V, int J>
QK_INLINE void sum_column(const DepthwiseStrip& s, const __m512i (&first)[V],
                          const __m512i (&middle)[V], const __m512i (&last)[V], __m512i (&acc)[V]) {
  acc[J] = _mm512_loadu_si512(s.init + 16 * J);
  dot_at<J * 64>(acc[J], first[J], s.weights);
  dot_at<(V + J) * 64>(acc[J], middle[J], s.weights);
  dot_at<(2 * V + J) * 64>(acc[J], last[J], s.weights);
}

template <int V, bool Flip>
static __attribute__((noinline)) void depthwise_by_two_avx512(const DepthwiseStrip& strip) {
  const DepthwiseStrip s = strip;
  const Columns512<V, Flip> input(strip);
  const bool plain = s.output_flip == 0 && s.qmin == 0 && s.qmax == 255;
  uint8_t* out = s.out[0];
  __m512i first[V], middle[V], last[V];
  input.read(0, first);
  for (int64_t x = 0; x < s.outputs; ++x, out += s.out_step) {
    __m512i acc[V];
    input.read(2 * x + 1, middle);
    input.read(2 * x + 2, last);
    sum_column<V, 0>(s, first, middle, last, acc);
    sum_column<V, 1>(s, first, middle, last, acc);
    if constexpr (V > 2) {
      sum_column<V, 2>(s, first, middle, last, acc);
      sum_column<V, 3>(s, first, middle, last, acc);
    }
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) first[j] = last[j];
    finish_column<V>(s, plain, acc, out);
  }
}

// Whether the strip is one of these.
QK_INLINE bool steps_by_two(const DepthwiseStrip& s) {
  return s.taps == 3 && s.tap_step == 1 && s.column_step == 2 && s.rows_out == 1 &&
         s.row_groups == 1 && s.quads == 0 && s.out_group == 1 && s.acc == nullptr;
}

template <int V>
QK_INLINE void depthwise_block(const DepthwiseStrip& s) {
  if (!steps_by_two(s)) return block<Avx512, V>(s);
  s.input_flip == 0 ? depthwise_by_two_avx512<V, false>(s) : depthwise_by_two_avx512<V, true>(s);
}
