// The epilogue of a panel of AMX's sums, a row of 64 columns at a time, between the tile products
// of the next panel. Include it in x86_amx.cc, after x86_avx512_store.h.
//
// Trick: tile instructions leave most of the core idle, and a step of 2 x 2 tiles hides about 90
//   vector instructions that are spread over it. So the common epilogues are part of the loop over
//   K, with their constants in registers, and they add init, which tiles would have to load.

constexpr int64_t kTileRows = 16, kPairRows = 2 * kTileRows;

// Where the outputs of a pair of tiles go. Not every row of the sums is one.
struct Places {
  int64_t rows = 0;
  int64_t sums[kPairRows];  // the row of the sums, ascending
  uint8_t* out[kPairRows];  // column 0
  const uint8_t* residual[kPairRows];
  uint32_t row_sums[kPairRows];  // with weight zero points
};

// A panel's sums that wait for their epilogue, [kPairRows][64].
struct Pending {
  const Places* places = nullptr;
  int32_t* sums = nullptr;
  int64_t column = 0, vectors = 0;

  int64_t rows() const { return places == nullptr ? 0 : places->rows; }
};

// What all panels of a call share.
struct FinishContext {
  const PackedMatrix& matrix;
  bool residual_signed;
  LookupKernel lookup;
  int64_t element;  // bytes of an output
};

// What PackedHeader::stores_plain_bytes() says, V vectors or fewer, as store_bytes_avx512().
template <int V, Residual R>
class FinishBytes {
 public:
  // What a row costs, in vectors without a residual.
  static constexpr int64_t kCost = R == Residual::kNone ? V : 2 * V;

  FinishBytes(const Pending& pending, const FinishContext& context)
      : rows_(pending.rows()),
        sums_(pending.sums),
        places_(pending.places),
        column_(pending.column),
        mask_(mask64(context.matrix.header->n - pending.column)),
        constants_(R == Residual::kNone ? requantize64_constants(context.matrix.header->epilogue)
                                        : residual64_constants(context.matrix.header->epilogue)),
        add_(context.matrix.header->epilogue) {
    const PackedMatrix& m = context.matrix;
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const auto mask = static_cast<__mmask16>(mask_ >> (16 * j));
      init_[j] = _mm512_maskz_load_epi32(mask, m.init + column_ + 16 * j);
      addend_[j] = _mm512_maskz_load_ps(mask, m.addend + column_ + 16 * j);
      mult_[j] = _mm512_maskz_load_ps(mask, m.mult + column_ + 16 * j);
    }
  }

  // The next `count` rows.
  inline __attribute__((always_inline)) void run(int64_t count) {
    for (const int64_t end = rows_ - next_ < count ? rows_ : next_ + count; next_ < end; ++next_) {
      row();
    }
  }

 private:
  inline __attribute__((always_inline)) void row() const {
    const int32_t* const sums = sums_ + 64 * places_->sums[next_];
    __m512i q[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (j >= V) {
        q[j] = _mm512_setzero_si512();
        continue;
      }
      const __m512i sum = _mm512_add_epi32(init_[j], _mm512_load_si512(sums + 16 * j));
      if (R == Residual::kNone) {
        q[j] = scale_x16(sum, addend_[j], mult_[j]);
      } else {
        q[j] = add_.template run<R == Residual::kS8>(
            _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(sum), addend_[j]), mult_[j]),
            _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask_ >> (16 * j)),
                                 places_->residual[next_] + column_ + 16 * j));
      }
    }
    _mm512_mask_storeu_epi8(places_->out[next_] + column_, mask_,
                            pack_x64(constants_, q[0], q[1], q[2], q[3]));
  }

  const int64_t rows_;
  int64_t next_ = 0;
  const int32_t* const sums_;
  const Places* const places_;
  const int64_t column_;
  const __mmask64 mask_;
  const Requantize64 constants_;
  const FusedAddX16 add_;
  __m512i init_[V];
  __m512 addend_[V], mult_[V];
};

// Everything else, by the stores of x86_avx512_store.h; init is in the sums.
class FinishAny {
 public:
  static constexpr int64_t kCost = 4;

  FinishAny(const Pending& pending, const FinishContext& context)
      : rows_(pending.rows()), sums_(pending.sums), places_(pending.places) {
    if (rows_ == 0) return;
    const PackedHeader& header = *context.matrix.header;
    const int64_t column = pending.column, rest = header.n - column;
    for (int64_t i = 0; i < rows_; ++i) out_[i] = places_->out[i] + column * context.element;
    if (header.epilogue.has_residual) {
      for (int64_t i = 0; i < rows_; ++i) residual_[i] = places_->residual[i] + column;
    }
    store_ = select_store(header, pending.vectors, context.residual_signed);
    tile_ = {.matrix = &context.matrix,
             .first_column = column,
             .columns = rest < 64 ? rest : 64,
             .row_sums = places_->row_sums,
             .out = out_,
             .residual = residual_,
             .residual_signed = context.residual_signed,
             .lookup = context.lookup};
  }

  inline __attribute__((always_inline)) void run(int64_t count) {
    if (next_ < rows_) run_rows(count < kMinRows ? kMinRows : count);
  }

 private:
  // The fewest rows that are worth a call.
  static constexpr int64_t kMinRows = 4;

  // A call for the rows whose sums follow each other.
  __attribute__((noinline)) void run_rows(int64_t count) {
    const int64_t end = rows_ - next_ < count ? rows_ : next_ + count;
    const int64_t* const row = places_->sums;
    while (next_ < end) {
      const int64_t first = next_++;
      while (next_ < end && row[next_] == row[next_ - 1] + 1) ++next_;
      store_(tile_, sums_ + 64 * (row[first] - first), first, next_);
    }
  }

  const int64_t rows_;
  int64_t next_ = 0;
  const int32_t* const sums_;
  const Places* const places_;
  StoreRows store_ = nullptr;
  IgemmTile tile_ = {};
  uint8_t* out_[kPairRows];
  const uint8_t* residual_[kPairRows];
};
