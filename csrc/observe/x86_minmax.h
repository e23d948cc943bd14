// The extremes of a run for any vector width; included inside the target region of each x86_*.cc.

template <typename V, typename T>
QK_INLINE bool minmax_uniform(const MinMaxRun& run) {
  using F = typename V::F;
  constexpr int64_t kLanes = V::kLanes;
  const T* x = static_cast<const T*>(run.x);
  F low[4], high[4];
  typename V::M nan = V::none();
  for (int k = 0; k < 4; ++k) {
    low[k] = V::set(run.low[0]);
    high[k] = V::set(run.high[0]);
  }
  int64_t i = 0;
  for (; i + 4 * kLanes <= run.n; i += 4 * kLanes) {
    F v[4];
    for (int k = 0; k < 4; ++k) v[k] = V::get(x + i + k * kLanes);
    for (int k = 0; k < 4; ++k) {
      low[k] = V::min(v[k], low[k]);  // NaN: the second operand
      high[k] = V::max(v[k], high[k]);
    }
    nan = V::either(nan, V::either(V::unordered(v[0], v[1]), V::unordered(v[2], v[3])));
  }
  for (; i + kLanes <= run.n; i += kLanes) {
    const F v = V::get(x + i);
    low[0] = V::min(v, low[0]);
    high[0] = V::max(v, high[0]);
    nan = V::either(nan, V::unordered(v, v));
  }
  for (int k = 1; k < 4; ++k) {
    low[0] = V::min(low[k], low[0]);
    high[0] = V::max(high[k], high[0]);
  }
  alignas(64) float lows[kLanes], highs[kLanes];
  V::put(lows, low[0]);
  V::put(highs, high[0]);
  for (int64_t k = 0; k < kLanes; ++k) {
    if (lows[k] < run.low[0]) run.low[0] = lows[k];
    if (highs[k] > run.high[0]) run.high[0] = highs[k];
  }
  bool any = V::bits(nan) != 0;
  for (int64_t end = i + ((run.n - i) & (kLanes - 1)); i < end; ++i) {
    any |= minmax_element<T>(run, i);
  }
  return any;
}

template <typename V, typename T>
QK_INLINE bool minmax_columns(const MinMaxRun& run) {
  using F = typename V::F;
  constexpr int64_t kLanes = V::kLanes;
  const T* x = static_cast<const T*>(run.x);
  typename V::M nan = V::none();
  int64_t i = 0;
  for (; i + kLanes <= run.n; i += kLanes) {
    const F v = V::get(x + i);
    V::put(run.low + i, V::min(v, V::get(run.low + i)));
    V::put(run.high + i, V::max(v, V::get(run.high + i)));
    nan = V::either(nan, V::unordered(v, v));
  }
  bool any = V::bits(nan) != 0;
  for (int64_t end = i + ((run.n - i) & (kLanes - 1)); i < end; ++i) {
    any |= minmax_element<T>(run, i);
  }
  return any;
}

template <typename V, typename T>
QK_INLINE bool minmax_any(const MinMaxRun& run) {
  return run.per_element ? minmax_columns<V, T>(run) : minmax_uniform<V, T>(run);
}
