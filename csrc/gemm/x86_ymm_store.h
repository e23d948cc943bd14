// The stores of AVX2 and AVX-VNNI: sums of 16 columns, or of 8, to outputs of any type. Include it
// inside a target region, inside the anonymous namespace of a kernel file, after x86_driver.h and
// x86_avx2_epilogue.h.

QK_INLINE void store_high(uint8_t* out, __m128i v) {
  const int64_t bytes = _mm_extract_epi64(v, 1);
  __builtin_memcpy(out, &bytes, 8);
}

// Bytes [0, n) of a vector of bytes to out[0], the next n of its next 8 * V bytes to out[1], ...
template <int V>
QK_INLINE void store_rows(uint8_t* const* out, int64_t rows, int64_t n, __m256i bytes) {
  constexpr int64_t kPart = 8 * V;
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  if (n < kPart) {
    alignas(32) uint8_t memory[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(memory), bytes);
    for (int64_t i = 0; i < rows; ++i) {
      __builtin_memcpy(out[i], memory + kPart * i, static_cast<size_t>(n));
    }
  } else if constexpr (V == 2) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[0]), low);
    if (rows > 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(out[1]), high);
  } else {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out[0]), low);
    if (rows > 1) store_high(out[1], low);
    if (rows > 2) _mm_storel_epi64(reinterpret_cast<__m128i*>(out[2]), high);
    if (rows > 3) store_high(out[3], high);
  }
}

// Where the rows of a tile are stored, on from tile to tile.
struct TileRows {
  explicit TileRows(const IgemmTile& tile)
      : out(tile.out), residual(tile.residual), row_sums(tile.row_sums) {}

  inline __attribute__((always_inline)) void advance(int64_t count) {
    out += count;
    residual += count;
    row_sums += count;
  }

  uint8_t* const* out;
  const uint8_t* const* residual;
  const uint32_t* row_sums;
};

// Table and residual, in place on the bytes just written (still in L1).
__attribute__((noinline)) void finish_bytes_avx2(const IgemmTile& tile, TileRows rows,
                                                 int64_t count) {
  const Epilogue& e = tile.matrix->header->epilogue;
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* q = rows.out[i];
    if (e.has_table) tile.lookup({q, q, e.table, 1, tile.columns, 0, 0});
    if (e.has_residual) {
      residual_add_avx2(e, q, rows.residual[i], tile.residual_signed, tile.columns);
    }
  }
}

// Every output: from the accumulators in memory, [count][16].
__attribute__((noinline)) void store_general_avx2(const IgemmTile& tile, TileRows rows,
                                                  const int32_t* acc, int64_t count) {
  const PackedMatrix& m = *tile.matrix;
  const Epilogue& e = m.header->epilogue;
  const int64_t element = output_bytes(e.output);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < tile.columns; c += 8) {
      const int64_t column = tile.first_column + c;
      __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(acc + 16 * i + c));
      if (m.weight_zero_point != nullptr) {
        const __m256i zw =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(m.weight_zero_point + column));
        const __m256i row = _mm256_set1_epi32(static_cast<int32_t>(rows.row_sums[i]));
        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zw, row));
      }
      store_x8(e, sum, _mm256_load_ps(m.addend + column), _mm256_load_ps(m.mult + column),
               rows.out[i] + c * element, tile.columns - c);
    }
  }
  finish_bytes_avx2(tile, rows, count);
}

// How the sums of a panel become outputs, read once, as a store of bytes may alias it.
template <int V>
struct YmmStore {
  explicit YmmStore(const IgemmTile& tile)
      : pack(tile.matrix->header->epilogue),
        pack_sum(tile.matrix->header->epilogue, tile.matrix->header->epilogue.residual),
        add(tile.matrix->header->epilogue),
        addend(tile.matrix->addend + tile.first_column),
        mult(tile.matrix->mult + tile.first_column),
        columns(tile.columns),
        packs(tile.matrix->header->packs_bytes()),
        looks_up(tile.matrix->header->epilogue.has_table != 0),
        adds(tile.matrix->header->epilogue.has_residual != 0) {}

  // R rows, from registers, or by way of memory what is not just bytes.
  template <int R>
  inline __attribute__((always_inline)) void run(const IgemmTile& tile, const TileRows& rows,
                                                 const __m256i (&acc)[R][V]) const {
    if (!packs) {
      alignas(32) int32_t memory[R][16];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(&memory[i][8 * j]), acc[i][j]);
        }
      }
      store_general_avx2(tile, rows, memory[0], R);
    } else if (looks_up || !adds) {
      bytes<R, Residual::kNone>(pack, rows, acc);
      if (looks_up) finish_bytes_avx2(tile, rows, R);
    } else if (tile.residual_signed) {
      bytes<R, Residual::kS8>(pack_sum, rows, acc);
    } else {
      bytes<R, Residual::kU8>(pack_sum, rows, acc);
    }
  }

  template <int R, Residual kResidual>
  inline __attribute__((always_inline)) void bytes(const PackX32& packing, const TileRows& rows,
                                                   const __m256i (&acc)[R][V]) const {
    constexpr int kGroup = 4 / V;
#pragma GCC unroll 8
    for (int i = 0; i < R; i += kGroup) {
      __m256i q[4];
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const int row = i + part / V, c = part % V;
        q[part] = row < R ? rounded<kResidual>(acc[row < R ? row : 0][c], rows, row, c) : q[0];
      }
      store_rows<V>(rows.out + i, R - i < kGroup ? R - i : kGroup, columns,
                    packing.run(q[0], q[1], q[2], q[3]));
    }
  }

  // Vector c of a row, RNE of the value over the output scale.
  template <Residual kResidual>
  inline __attribute__((always_inline)) __m256i rounded(__m256i acc, const TileRows& rows, int row,
                                                        int c) const {
    const __m256 v = scale_x8(acc, _mm256_load_ps(addend + 8 * c), _mm256_load_ps(mult + 8 * c));
    if constexpr (kResidual == Residual::kNone) return _mm256_cvtps_epi32(v);
    return add.template run<kResidual == Residual::kS8>(v, rows.residual[row] + 8 * c,
                                                        columns - 8 * c);
  }

  PackX32 pack, pack_sum;
  FusedAddX8 add;
  const float *addend, *mult;
  int64_t columns;
  bool packs, looks_up, adds;
};
