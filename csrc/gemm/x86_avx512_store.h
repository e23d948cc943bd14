// From a block of accumulators in memory, [rows][64], to the output: the stages that AVX512-VNNI
// and AMX share. Include it after x86_driver.h and x86_avx512_epilogue.h.

// Rows [begin, end) of a tile, from `acc` on: 64 accumulators a row.
using StoreRows = void (*)(const IgemmTile& tile, const int32_t* acc, int64_t begin, int64_t end);

// Table and residual of rows [begin, end), in place on the bytes just written (still in L1).
__attribute__((noinline)) void finish_bytes_avx512(const IgemmTile& tile, int64_t begin,
                                                   int64_t end) {
  const Epilogue& e = tile.matrix->header->epilogue;
  if (e.has_table) {
    for (int64_t i = begin; i < end; ++i) {
      tile.lookup({tile.out[i], tile.out[i], e.table, 1, tile.columns, 0, 0});
    }
  }
  if (e.has_residual) {
    const ResidualAddX16 residual(e, tile.residual_signed);
    for (int64_t i = begin; i < end; ++i) {
      residual.run(tile.out[i], tile.residual[i], tile.columns);
    }
  }
}

// Every output.
__attribute__((noinline)) void store_general_avx512(const IgemmTile& tile, const int32_t* acc,
                                                    int64_t begin, int64_t end) {
  const PackedMatrix& m = *tile.matrix;
  const Epilogue& e = m.header->epilogue;
  const int64_t element = output_bytes(e.output);
  for (int64_t i = begin; i < end; ++i) {
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
  if (e.has_table || e.has_residual) finish_bytes_avx512(tile, begin, end);
}

// float32 without weight zero points, the output of a forward in training: constants in registers,
// a mask for the last vector alone.
template <int V>
__attribute__((noinline)) void store_floats_avx512(const IgemmTile& tile, const int32_t* acc,
                                                   int64_t begin, int64_t end) {
  const __mmask16 last = mask16(tile.columns - 16 * (V - 1));
  __m512 addend[V], mult[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    addend[j] = _mm512_load_ps(tile.matrix->addend + tile.first_column + 16 * j);
    mult[j] = _mm512_load_ps(tile.matrix->mult + tile.first_column + 16 * j);
  }
  uint8_t* const* out = tile.out;
  for (int64_t i = begin; i < end; ++i) {
    auto* y = reinterpret_cast<float*>(out[i]);
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(acc + 64 * i + 16 * j));
      const __m512 v = _mm512_mul_ps(_mm512_add_ps(sum, addend[j]), mult[j]);
      j + 1 < V ? _mm512_storeu_ps(y + 16 * j, v) : _mm512_mask_storeu_ps(y + 16 * j, last, v);
    }
  }
}

// 8-bit outputs without weight zero points: constants and a whole row in registers.
template <int V, Residual R>
__attribute__((noinline)) void store_bytes_avx512(const IgemmTile& tile, const int32_t* acc,
                                                  int64_t begin, int64_t end) {
  const Epilogue& e = tile.matrix->header->epilogue;
  const Requantize64 constants =
      R == Residual::kNone ? requantize64_constants(e) : residual64_constants(e);
  const FusedAddX16 add(e);
  const __mmask64 mask = mask64(tile.columns);
  __m512 addend[V], mult[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    addend[j] = _mm512_load_ps(tile.matrix->addend + tile.first_column + 16 * j);
    mult[j] = _mm512_load_ps(tile.matrix->mult + tile.first_column + 16 * j);
  }
  uint8_t* const* out = tile.out;
  const uint8_t* const* residual = tile.residual;
  for (int64_t i = begin; i < end; ++i) {
    __m512i q[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (j >= V) {
        q[j] = _mm512_setzero_si512();
      } else if (R == Residual::kNone) {
        q[j] = scale_x16(_mm512_load_si512(acc + 64 * i + 16 * j), addend[j], mult[j]);
      } else {
        const __m512 v = _mm512_mul_ps(
            _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_load_si512(acc + 64 * i + 16 * j)), addend[j]),
            mult[j]);
        q[j] = add.run<R == Residual::kS8>(
            v,
            _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask >> (16 * j)), residual[i] + 16 * j));
      }
    }
    _mm512_mask_storeu_epi8(out[i], mask, pack_x64(constants, q[0], q[1], q[2], q[3]));
  }
}

template <Residual R>
QK_INLINE StoreRows store_bytes_of(int64_t vectors) {
  switch (vectors) {
    case 1:
      return store_bytes_avx512<1, R>;
    case 2:
      return store_bytes_avx512<2, R>;
    case 3:
      return store_bytes_avx512<3, R>;
    default:
      return store_bytes_avx512<4, R>;
  }
}

QK_INLINE StoreRows store_floats_of(int64_t vectors) {
  switch (vectors) {
    case 1:
      return store_floats_avx512<1>;
    case 2:
      return store_floats_avx512<2>;
    case 3:
      return store_floats_avx512<3>;
    default:
      return store_floats_avx512<4>;
  }
}

// The store of a panel that is `vectors` wide.
QK_INLINE StoreRows select_store(const PackedHeader& header, int64_t vectors,
                                 bool residual_signed) {
  if (header.epilogue.output == OutputType::kF32 && !header.has_weight_zero_point) {
    return store_floats_of(vectors);
  }
  if (!header.stores_plain_bytes()) return store_general_avx512;
  if (!header.epilogue.has_residual) return store_bytes_of<Residual::kNone>(vectors);
  return residual_signed ? store_bytes_of<Residual::kS8>(vectors)
                         : store_bytes_of<Residual::kU8>(vectors);
}
