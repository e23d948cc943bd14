// The extremes of a run for any vector width; included inside the target region of each x86_*.cc.

template <typename V, typename T>
QK_INLINE bool minmax_uniform(const MinMaxRun& run) {
  using F = typename V::F;
  constexpr int64_t kLanes = V::kLanes;
  const T* x = static_cast<const T*>(run.x);
  F low = V::set(run.low[0]), high = V::set(run.high[0]);
  typename V::M nan = V::none();
  const auto take = [&](F v) __attribute__((always_inline)) {
    low = V::min(v, low);  // NaN: the second operand
    high = V::max(v, high);
    nan = V::either(nan, V::unordered(v, v));
  };
  int64_t i = 0;
  if (run.n >= 4 * kLanes) {
    F lows[4] = {low, low, low, low}, highs[4] = {high, high, high, high};
    for (; i + 4 * kLanes <= run.n; i += 4 * kLanes) {
      F v[4];
      for (int k = 0; k < 4; ++k) v[k] = V::get(x + i + k * kLanes);
      for (int k = 0; k < 4; ++k) {
        lows[k] = V::min(v[k], lows[k]);
        highs[k] = V::max(v[k], highs[k]);
      }
      nan = V::either(nan, V::either(V::unordered(v[0], v[1]), V::unordered(v[2], v[3])));
    }
    low = V::min(V::min(lows[0], lows[1]), V::min(lows[2], lows[3]));
    high = V::max(V::max(highs[0], highs[1]), V::max(highs[2], highs[3]));
  }
  for (; i + kLanes <= run.n; i += kLanes) take(V::get(x + i));
  if (i < run.n && run.n >= kLanes) {
    take(V::get(x + run.n - kLanes));  // some elements twice: the extremes do not mind
  } else if (i < run.n) {
    take(V::select(V::first_lanes(run.n), V::get(x, run.n), V::set(to_float(x[0]))));
  }
  run.low[0] = V::least(low);
  run.high[0] = V::greatest(high);
  return V::bits(nan) != 0;
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
