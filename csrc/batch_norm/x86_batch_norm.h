// The kernels of batch_norm.h for any vector width. Include it inside the target region of a kernel
// file, inside its anonymous namespace.

// The masks of the tails tell gcc that they are short, or it vectorizes them.

// So many rows ahead memory is on its way to L1, where sums go through several rows at a time: such
// steps the hardware does not foresee.
constexpr int64_t kAhead = 4;

// kRows rows for each time that the sums are loaded.
template <typename V, int kRows>
QK_INLINE typename V::M statistics_rows(const StatisticsRun& run, const float* x, int64_t vectors) {
  using F = typename V::F;
  const int64_t stride = run.at.stride;
  typename V::M nan = V::none();
  for (int64_t j = 0; j < vectors; j += V::kLanes) {
    const F origin = V::get(run.origin + j);
    F sum = V::get(run.sum + j), square = V::get(run.square + j);
    F low = V::get(run.low + j), high = V::get(run.high + j);
    for (int k = 0; k < kRows; ++k) {
      __builtin_prefetch(x + (k + kAhead) * stride + j);
      const F v = V::get(x + k * stride + j), d = V::sub(v, origin);
      sum = V::add(sum, d);
      square = V::add(square, V::mul(d, d));
      low = V::min(v, low);  // NaN: the second operand
      high = V::max(v, high);
      nan = V::either(nan, V::unordered(v, v));
    }
    V::put(run.sum + j, sum);
    V::put(run.square + j, square);
    V::put(run.low + j, low);
    V::put(run.high + j, high);
  }
  return nan;
}

template <typename V>
QK_INLINE bool statistics_run(const StatisticsRun& run) {
  const int64_t n = run.at.n, vectors = n & -int64_t{V::kLanes};
  typename V::M nan = V::none();
  int64_t r = 0;
  for (; r + 4 <= run.at.rows; r += 4) {
    nan = V::either(nan, statistics_rows<V, 4>(run, run.x + r * run.at.stride, vectors));
  }
  for (; r < run.at.rows; ++r) {
    nan = V::either(nan, statistics_rows<V, 1>(run, run.x + r * run.at.stride, vectors));
  }
  bool any = V::bits(nan) != 0;
  for (int64_t k = 0, tail = n & (V::kLanes - 1); k < tail; ++k)
    any |= statistics_column(run, vectors + k);
  return any;
}

// A run's rows can be stored past the caches: each of its vectors starts at a multiple of 64 bytes.
QK_INLINE bool rows_are_aligned(const float* out, const NormRows& at) {
  return (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(at.stride * 4)) % 64 == 0;
}

template <typename V, bool kStream, bool kCodes>
QK_INLINE void norm_fake_quant_run(const NormFakeQuantRun& run) {
  using F = typename V::F;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t n = run.at.n, vectors = n & -kLanes;
  const F scale = V::set(run.grid.scale), inv_scale = V::set(run.grid.inv_scale);
  const F lo = V::set(run.grid.lo), hi = V::set(run.grid.hi), zp = V::set(run.grid.zero_point);
  const F floor = V::set(run.grid.floor), ceiling = V::set(run.grid.ceiling);
  const F rounder = V::set(kRounder);
  const float *factor = run.factor, *shift = run.shift;
  for (int64_t r = 0; r < run.at.rows; ++r) {
    const float* x = run.x + r * run.at.stride;
    float* y = run.y + r * run.at.stride;
    uint8_t* codes = kCodes ? run.codes + r * run.at.stride : nullptr;
    for (int64_t j = 0; j < vectors; j += kLanes) {
      const F t = V::fma(V::get(x + j), V::get(factor + j), V::get(shift + j));
      const F v = V::mul(V::min(V::max(t, floor), ceiling), inv_scale);
      const F bounded = V::min(V::max(v, lo), hi);
      const F offset = V::sub(V::add(bounded, rounder), rounder), out = V::mul(offset, scale);
      if constexpr (kCodes) V::put_bytes(codes + j, V::add(offset, zp));
      kStream ? V::stream(y + j, out) : V::put(y + j, out);
    }
    for (int64_t k = 0, tail = n & (V::kLanes - 1); k < tail; ++k)
      norm_fake_quant_element(run, r, vectors + k);
  }
}

template <typename V>
QK_INLINE void norm_fake_quant_any(const NormFakeQuantRun& run) {
  const bool stream = run.stream && rows_are_aligned(run.y, run.at);
  if (run.codes != nullptr) {
    stream ? norm_fake_quant_run<V, true, true>(run) : norm_fake_quant_run<V, false, true>(run);
  } else {
    stream ? norm_fake_quant_run<V, true, false>(run) : norm_fake_quant_run<V, false, false>(run);
  }
}

template <typename V>
struct NormVectors {
  typename V::F inv_scale, lo, hi, floor, ceiling;

  QK_INLINE NormVectors of(const NormSteps& grid) {
    return {V::set(grid.inv_scale), V::set(grid.lo), V::set(grid.hi), V::set(grid.floor),
            V::set(grid.ceiling)};
  }
};

// norm_terms of one vector.
template <typename V, bool kLearned, bool kTerms>
QK_INLINE void norm_terms_vector(const NormVectors<V>& grid, typename V::F x, typename V::F grad,
                                 typename V::F factor, typename V::F shift, typename V::F mean,
                                 typename V::F (&terms)[kNormSums]) {
  using F = typename V::F;
  const F t = V::fma(x, factor, shift);
  F u = t;
  if constexpr (kLearned) u = V::min(V::max(t, grid.floor), grid.ceiling);
  const F v = V::mul(u, grid.inv_scale), r = V::round(v);
  const typename V::M inside = V::both(V::ge(r, grid.lo), V::le(r, grid.hi));
  typename V::M passes = inside;
  if constexpr (kLearned) {
    passes = V::both(passes, V::both(V::gt(t, grid.floor), V::gt(grid.ceiling, t)));
  }
  terms[0] = V::keep(passes, grad);
  if constexpr (kTerms) {
    terms[1] = V::mul(terms[0], V::sub(x, mean));
    if constexpr (kLearned) {
      const F clamped = V::min(V::max(r, grid.lo), grid.hi);
      terms[2] = V::mul(grad, V::select(inside, V::sub(r, v), clamped));
      terms[3] = V::select(inside, V::zero(), grad);
    }
  }
}

template <typename V, bool kLearned, int kRows>
__attribute__((noinline)) void norm_sums_rows(const NormBackwardRun& run, int64_t first,
                                              int64_t vectors) {
  using F = typename V::F;
  constexpr int kSums = kLearned ? kNormSums : 2;
  const int64_t stride = run.at.stride;
  const float *x = run.x + first, *grad = run.grad + first, *columns = run.columns;
  float* sums = run.sums;
  const NormVectors<V> grid = NormVectors<V>::of(run.grid);
  for (int64_t j = 0; j < vectors; j += V::kLanes) {
    const F factor = V::get(columns + kFactor * kGridBlock + j);
    const F shift = V::get(columns + kShift * kGridBlock + j);
    const F mean = V::get(columns + kMean * kGridBlock + j);
    F total[kSums];
    for (int s = 0; s < kSums; ++s) total[s] = V::get(sums + s * kGridBlock + j);
    for (int k = 0; k < kRows; ++k) {
      F terms[kNormSums];
      __builtin_prefetch(x + (k + kAhead) * stride + j);
      __builtin_prefetch(grad + (k + kAhead) * stride + j);
      norm_terms_vector<V, kLearned, true>(grid, V::get(x + k * stride + j),
                                           V::get(grad + k * stride + j), factor, shift, mean,
                                           terms);
      for (int s = 0; s < kSums; ++s) total[s] = V::add(total[s], terms[s]);
    }
    for (int s = 0; s < kSums; ++s) V::put(sums + s * kGridBlock + j, total[s]);
  }
}

template <typename V, bool kLearned>
QK_INLINE void norm_sums_run(const NormBackwardRun& run) {
  const int64_t n = run.at.n, vectors = n & -int64_t{V::kLanes};
  int64_t r = 0;
  for (; r + 2 <= run.at.rows; r += 2) {
    norm_sums_rows<V, kLearned, 2>(run, r * run.at.stride, vectors);
  }
  if (r < run.at.rows) norm_sums_rows<V, kLearned, 1>(run, r * run.at.stride, vectors);
  for (int64_t k = 0, tail = n & (V::kLanes - 1); k < tail; ++k)
    norm_sums_column<kLearned>(run, vectors + k);
}

template <typename V, bool kLearned, bool kStream>
__attribute__((noinline)) void norm_out_row(const NormBackwardRun& run, int64_t first,
                                            int64_t vectors) {
  using F = typename V::F;
  const float *x = run.x + first, *grad = run.grad + first, *columns = run.columns;
  float* out = run.out + first;
  const NormVectors<V> grid = NormVectors<V>::of(run.grid);
  for (int64_t j = 0; j < vectors; j += V::kLanes) {
    const float* column = columns + j;
    const F value = V::get(x + j), factor = V::get(column + kFactor * kGridBlock);
    const F mean = V::get(column + kMean * kGridBlock);
    F terms[kNormSums];
    norm_terms_vector<V, kLearned, false>(grid, value, V::get(grad + j), factor,
                                          V::get(column + kShift * kGridBlock), mean, terms);
    const F direct = V::fma(factor, terms[0], V::get(column + kOffset * kGridBlock));
    const F v = V::fma(V::get(column + kSlope * kGridBlock), V::sub(value, mean), direct);
    kStream ? V::stream(out + j, v) : V::put(out + j, v);
  }
}

template <typename V, bool kLearned, bool kStream>
QK_INLINE void norm_out_run(const NormBackwardRun& run) {
  const int64_t n = run.at.n, vectors = n & -int64_t{V::kLanes};
  for (int64_t r = 0; r < run.at.rows; ++r) {
    norm_out_row<V, kLearned, kStream>(run, r * run.at.stride, vectors);
    for (int64_t k = 0, tail = n & (V::kLanes - 1); k < tail; ++k)
      norm_out_element<kLearned>(run, r, vectors + k);
  }
}

template <typename V, bool kLearned>
QK_INLINE void norm_backward_with(const NormBackwardRun& run) {
  if (run.out == nullptr) {
    norm_sums_run<V, kLearned>(run);
  } else if (run.stream && rows_are_aligned(run.out, run.at)) {
    norm_out_run<V, kLearned, true>(run);
  } else {
    norm_out_run<V, kLearned, false>(run);
  }
}

template <typename V>
QK_INLINE void norm_backward_any(const NormBackwardRun& run) {
  run.learned ? norm_backward_with<V, true>(run) : norm_backward_with<V, false>(run);
}
