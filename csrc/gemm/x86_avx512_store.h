// From a block of accumulators in memory, [rows][64], to the output: the stages that AVX512-VNNI
// and AMX share. Include it after x86_driver.h and x86_avx512_epilogue.h.

// Every other output: from the accumulators in memory, [rows][64].
__attribute__((noinline)) void store_general_avx512(const IgemmTile& tile, const int32_t* acc,
                                                    int64_t rows) {
  const PackedMatrix& m = tile.matrix;
  const Epilogue& e = m.header->epilogue;
  const int64_t element = output_bytes(e.output);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < tile.columns; c += 16) {
      __m512i sum = _mm512_load_si512(acc + 64 * i + c);
      if (m.weight_zero_point != nullptr) {
        const __m512i zw = _mm512_load_si512(m.weight_zero_point + tile.first_column + c);
        const __m512i row = _mm512_set1_epi32(static_cast<int32_t>(tile.row_sums[i]));
        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zw, row));
      }
      store_x16(e, sum, _mm512_load_ps(m.addend + tile.first_column + c),
                _mm512_load_ps(m.mult + tile.first_column + c), tile.out[i] + c * element,
                mask16(tile.columns - c));
    }
  }
}

// Table and residual, in place on the bytes just written (still in L1).
__attribute__((noinline)) void finish_bytes_avx512(const IgemmTile& tile, int64_t rows) {
  const Epilogue& e = tile.matrix.header->epilogue;
  if (e.has_table) {
    for (int64_t i = 0; i < rows; ++i) {
      tile.lookup({tile.out[i], tile.out[i], e.table, 1, tile.columns, 0, 0});
    }
  }
  if (e.has_residual) {
    const ResidualAddX16 residual(e, tile.residual_signed);
    for (int64_t i = 0; i < rows; ++i) {
      residual.run(tile.out[i], tile.residual[i], tile.columns);
    }
  }
}

// One row of the 8-bit store without weight zero points.
template <int V>
QK_INLINE void store_bytes_row(const IgemmTile& tile, const Requantize64& constants,
                               const int32_t* acc, uint8_t* out, __mmask64 mask) {
  const float* addend = tile.matrix.addend + tile.first_column;
  const float* mult = tile.matrix.mult + tile.first_column;
  __m512i q[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    q[j] = j < V ? scale_x16(_mm512_load_si512(acc + 16 * j), _mm512_load_ps(addend + 16 * j),
                             _mm512_load_ps(mult + 16 * j))
                 : _mm512_setzero_si512();
  }
  _mm512_mask_storeu_epi8(out, mask, pack_x64(constants, q[0], q[1], q[2], q[3]));
}

template <int V>
QK_INLINE void store_bytes_rows(const IgemmTile& tile, const int32_t* acc, int64_t rows) {
  const Requantize64 constants = requantize64_constants(tile.matrix.header->epilogue);
  const __mmask64 mask = mask64(tile.columns);
  for (int64_t i = 0; i < rows; ++i) {
    store_bytes_row<V>(tile, constants, acc + 64 * i, tile.out[i], mask);
  }
}

// The whole epilogue of `rows` rows of sums.
QK_INLINE void store_sums(const IgemmTile& tile, const int32_t* acc, int64_t rows,
                          int64_t vectors) {
  const PackedHeader& header = *tile.matrix.header;
  if (header.epilogue.is_8bit() && !header.wide && !header.has_weight_zero_point) {
    switch (vectors) {
      case 1:
        store_bytes_rows<1>(tile, acc, rows);
        break;
      case 2:
        store_bytes_rows<2>(tile, acc, rows);
        break;
      case 3:
        store_bytes_rows<3>(tile, acc, rows);
        break;
      default:
        store_bytes_rows<4>(tile, acc, rows);
    }
  } else {
    store_general_avx512(tile, acc, rows);
  }
  if (header.epilogue.has_table || header.epilogue.has_residual) finish_bytes_avx512(tile, rows);
}
