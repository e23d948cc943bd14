// The store of bytes of AVX2's tiles, whose vectors are columns of eight rows: scaled and packed as
// they are, then transposed as dwords of four columns. Include it inside a target region, inside
// the anonymous namespace of a kernel file, after x86_driver.h and x86_avx2_epilogue.h.

struct FourVectors {
  __m256i at[4];
};

// Dword i of vector j becomes dword j of vector i, in each lane.
QK_INLINE FourVectors transpose_dwords(const FourVectors& v) {
  const __m256i low01 = _mm256_unpacklo_epi32(v.at[0], v.at[1]);
  const __m256i high01 = _mm256_unpackhi_epi32(v.at[0], v.at[1]);
  const __m256i low23 = _mm256_unpacklo_epi32(v.at[2], v.at[3]);
  const __m256i high23 = _mm256_unpackhi_epi32(v.at[2], v.at[3]);
  return {{_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
           _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)}};
}

template <int kBytes>
QK_INLINE __m128i load_low_bytes(const uint8_t* p) {
  const auto* from = reinterpret_cast<const __m128i*>(p);
  return kBytes == 16 ? _mm_loadu_si128(from) : _mm_loadl_epi64(from);
}

// Bytes [at, at + 16) of eight rows, or [at, at + 8), as four vectors of their dwords.
template <int kBytes = 16>
QK_INLINE FourVectors dwords_of_rows(const uint8_t* const (&rows)[8], int64_t at) {
  FourVectors v;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m128i low = load_low_bytes<kBytes>(rows[i] + at);
    const __m128i high = load_low_bytes<kBytes>(rows[i + 4] + at);
    v.at[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  return transpose_dwords(v);
}

struct ColumnStore {
  explicit ColumnStore(const IgemmTile& tile)
      : pack(tile.matrix->header->epilogue),
        pack_sum(tile.matrix->header->epilogue, tile.matrix->header->epilogue.residual),
        add(tile.matrix->header->epilogue),
        addend(tile.matrix->addend + tile.first_column),
        mult(tile.matrix->mult + tile.first_column),
        columns(tile.columns) {}

  // Columns [column, column + 4) of eight rows: a dword of bytes for each row. `residual`: such
  // dwords.
  template <Residual kResidual>
  inline __attribute__((always_inline)) __m256i dwords(__m256i c0, __m256i c1, __m256i c2,
                                                       __m256i c3, int64_t column,
                                                       const uint8_t* residual) const {
    const PackX32& packing = kResidual == Residual::kNone ? pack : pack_sum;
    const __m256i by_column = packing.by_lanes(
        rounded<kResidual, 0>(c0, column, residual), rounded<kResidual, 1>(c1, column, residual),
        rounded<kResidual, 2>(c2, column, residual), rounded<kResidual, 3>(c3, column, residual));
    const __m128i by_row = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm256_shuffle_epi8(by_column, _mm256_broadcastsi128_si256(by_row));
  }

  // RNE of the values over the output scale.
  template <Residual kResidual, int kColumn>
  inline __attribute__((always_inline)) __m256i rounded(__m256i acc, int64_t column,
                                                        const uint8_t* residual) const {
    const __m256 v = scale_x8(acc, _mm256_broadcast_ss(addend + column + kColumn),
                              _mm256_broadcast_ss(mult + column + kColumn));
    if constexpr (kResidual == Residual::kNone) {
      return _mm256_cvtps_epi32(v);
    } else {
      const __m256i rows = _mm256_load_si256(reinterpret_cast<const __m256i*>(residual));
      const __m256i up = _mm256_slli_epi32(rows, 24 - 8 * kColumn);
      return add.run(v, _mm256_cvtepi32_ps(kResidual == Residual::kS8 ? _mm256_srai_epi32(up, 24)
                                                                      : _mm256_srli_epi32(up, 24)));
    }
  }

  // Dwords of 16 columns of `count` <= 8 rows, [column / 4][row], to their places.
  inline __attribute__((always_inline)) void store(const uint8_t* dwords, uint8_t* const* out,
                                                   int64_t count) const {
    FourVectors groups;
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      groups.at[g] = _mm256_load_si256(reinterpret_cast<const __m256i*>(dwords + 32 * g));
    }
    const FourVectors rows = transpose_dwords(groups);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (i < count) store_row(out[i], _mm256_castsi256_si128(rows.at[i]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (i + 4 < count) store_row(out[i + 4], _mm256_extracti128_si256(rows.at[i], 1));
    }
  }
  inline __attribute__((always_inline)) void store_row(uint8_t* out, __m128i bytes) const {
    if (columns == 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    } else {
      alignas(16) uint8_t memory[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(memory), bytes);
      copy_under_16(out, memory, columns);
    }
  }

  // The opposite, of the residual: rows that do not exist repeat the last.
  inline __attribute__((always_inline)) void load(const uint8_t* const* from, int64_t count,
                                                  uint8_t* dwords) const {
    const uint8_t* rows[8];
    uint8_t copies[8][16];
    for (int64_t i = 0; i < 8; ++i) {
      rows[i] = from[i < count ? i : count - 1];
      if (columns != 16 && columns != 8) {
        copy_under_16(copies[i], rows[i], columns);
        rows[i] = copies[i];
      }
    }
    const FourVectors groups = columns <= 8 ? dwords_of_rows<8>(rows, 0) : dwords_of_rows(rows, 0);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(dwords + 32 * g), groups.at[g]);
    }
  }

  PackX32 pack, pack_sum;
  FusedAddX8 add;
  const float *addend, *mult;
  int64_t columns;
};
