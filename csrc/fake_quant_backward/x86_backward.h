// The kernels of backward.h for any vector width. Include it inside the target region of a kernel
// file, inside its anonymous namespace.

template <typename V>
struct BackwardGrid {
  typename V::F inv_scale, lo, hi;
};

// One vector; `terms` gets the terms of the sums of scale and zero point.
template <typename V, bool kClips>
QK_INLINE typename V::M passes_of(const BackwardGrid<V>& grid, typename V::F x, typename V::F grad,
                                  typename V::F (*terms)[2]) {
  using F = typename V::F;
  const F v = V::mul(x, grid.inv_scale);
  const F r = kClips ? v : V::round(v);  // a clip does not round: r - v is 0
  const typename V::M passes = V::both(V::ge(r, grid.lo), V::le(r, grid.hi));
  if (terms != nullptr) {
    const F clamped = V::min(V::max(r, grid.lo), grid.hi);  // NaN: lo
    (*terms)[0] = V::mul(grad, V::select(passes, V::sub(r, v), clamped));
    (*terms)[1] = V::drop(passes, grad);
  }
  return passes;
}

// One grid for the run.
template <typename V, typename T, bool kSums, bool kStream, bool kClips = false>
QK_INLINE void backward_uniform(const FakeQuantBackwardRun& run) {
  using F = typename V::F;
  constexpr int64_t kLanes = V::kLanes, kVectors = kSumLanes / kLanes;
  const T* grad = static_cast<const T*>(run.grad);
  const T* x = static_cast<const T*>(run.x);
  Bits<T>* out = static_cast<Bits<T>*>(run.out);
  const int64_t n = run.n;
  const int32_t zp = run.grid.zero_point[0];
  const BackwardGrid<V> grid{V::set(run.grid.inv_scale[0]),
                             V::set(static_cast<float>(run.qmin - zp)),
                             V::set(static_cast<float>(run.qmax - zp))};
  struct Sums {
    F scale, zero;
  };
  Sums first{V::zero(), V::zero()},
      second = first;  // of lanes 0 to kLanes, and of the others if there are any
  const auto add = [](Sums& sums, const F(&terms)[2]) __attribute__((always_inline)) {
    if constexpr (kSums) {
      sums.scale = V::add(sums.scale, terms[0]);
      sums.zero = V::add(sums.zero, terms[1]);
    }
  };
  const auto step = [&](int64_t i, Sums& sums) __attribute__((always_inline)) {
    F terms[2];
    const typename V::M passes = passes_of<V, kClips>(
        grid, V::get(x + i), kSums ? V::get(grad + i) : V::zero(), kSums ? &terms : nullptr);
    add(sums, terms);
    V::template copy_where<kStream>(out + i, bits_of(grad + i), passes);
  };
  const auto partial_step = [&](int64_t i, int64_t count,
                                Sums& sums) __attribute__((always_inline)) {
    F terms[2];
    const typename V::M passes =
        passes_of<V, kClips>(grid, V::get(x + i, count),
                             kSums ? V::get(grad + i, count) : V::zero(), kSums ? &terms : nullptr);
    add(sums, terms);  // +-0 beyond the run
    V::copy_where(out + i, bits_of(grad + i), passes, count);
  };
  const auto steps = [&](int64_t i) __attribute__((always_inline)) {
    step(i, first);
    if constexpr (kVectors == 2) step(i + kLanes, second);
  };
  int64_t i = 0;
  for (; i + 2 * kSumLanes <= n; i += 2 * kSumLanes) {
    steps(i);
    steps(i + kSumLanes);
  }
  if (i + kSumLanes <= n) {
    steps(i);
    i += kSumLanes;
  }
  if (kVectors == 2 && i + kLanes <= n) {
    step(i, first);
    i += kLanes;
    if (i < n) partial_step(i, n - i, second);
  } else if (i < n) {
    partial_step(i, n - i, first);
  }
  if constexpr (kSums) {
    alignas(64) float lanes[2][2 * kSumLanes];  // one vector too many where there is no second
    V::put(lanes[0], first.scale);
    V::put(lanes[1], first.zero);
    V::put(lanes[0] + kLanes, second.scale);
    V::put(lanes[1] + kLanes, second.zero);
    for (int s = 0; s < 2; ++s) run.partial[s] = sum_lanes(lanes[s]);
  }
}

// One grid an element; kRows rows for each time that grids and sums are loaded.
template <typename V, typename T, bool kSums, bool kStream, bool kClips, int kRows>
QK_INLINE void backward_columns(const FakeQuantBackwardRun& run) {
  using F = typename V::F;
  constexpr int64_t kLanes = V::kLanes;
  const T* grad = static_cast<const T*>(run.grad);
  const T* x = static_cast<const T*>(run.x);
  Bits<T>* out = static_cast<Bits<T>*>(run.out);
  const int64_t n = run.n, out_step = run.out_step, x_step = run.x_step;
  const GridSpan span = run.grid;
  float *scale_sums = run.columns, *zero_sums = run.columns + kGridBlock;
  const F qmin = V::set(static_cast<float>(run.qmin)), qmax = V::set(static_cast<float>(run.qmax));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F zp = V::get(span.zero_point + i);
    const BackwardGrid<V> grid{V::get(span.inv_scale + i), V::sub(qmin, zp), V::sub(qmax, zp)};
    F sums[2], terms[2];
    if constexpr (kSums) {
      sums[0] = V::get(scale_sums + i);
      sums[1] = V::get(zero_sums + i);
    }
    for (int64_t k = 0; k < kRows; ++k) {
      const T* row = grad + k * out_step + i;
      const typename V::M passes =
          passes_of<V, kClips>(grid, V::get(x + k * x_step + i), kSums ? V::get(row) : V::zero(),
                               kSums ? &terms : nullptr);
      if constexpr (kSums) {
        for (int s = 0; s < 2; ++s) sums[s] = V::add(sums[s], terms[s]);
      }
      V::template copy_where<kStream>(out + k * out_step + i, bits_of(row), passes);
    }
    if constexpr (kSums) {
      V::put(scale_sums + i, sums[0]);
      V::put(zero_sums + i, sums[1]);
    }
  }
  const int64_t left = n - i;
  if (left == 0) return;
  const F zp = V::get(span.zero_point + i, left);
  const BackwardGrid<V> grid{V::get(span.inv_scale + i, left), V::sub(qmin, zp), V::sub(qmax, zp)};
  for (int64_t k = 0; k < kRows; ++k) {
    const T* row = grad + k * out_step + i;
    F terms[2];
    const typename V::M passes =
        passes_of<V, kClips>(grid, V::get(x + k * x_step + i, left),
                             kSums ? V::get(row, left) : V::zero(), kSums ? &terms : nullptr);
    if constexpr (kSums) {
      V::put(scale_sums + i, V::add(V::get(scale_sums + i, left), terms[0]), left);
      V::put(zero_sums + i, V::add(V::get(zero_sums + i, left), terms[1]), left);
    }
    V::copy_where(out + k * out_step + i, bits_of(row), passes, left);
  }
}

template <typename V, typename T, bool kSums, bool kStream, bool kClips = false>
QK_INLINE void backward_per_element(const FakeQuantBackwardRun& run) {
  run.rows == 2 ? backward_columns<V, T, kSums, kStream, kClips, 2>(run)
                : backward_columns<V, T, kSums, kStream, kClips, 1>(run);
}

template <typename V, typename T, bool kStream>
QK_INLINE void backward_with(const FakeQuantBackwardRun& run) {
  if (run.columns != nullptr) {
    run.clips ? backward_per_element<V, T, true, kStream, true>(run)
              : backward_per_element<V, T, true, kStream>(run);
  } else if (run.partial != nullptr) {
    run.clips ? backward_uniform<V, T, true, kStream, true>(run)
              : backward_uniform<V, T, true, kStream>(run);
  } else if (run.grid.per_element) {
    backward_per_element<V, T, false, kStream>(run);
  } else {
    backward_uniform<V, T, false, kStream>(run);
  }
}

template <typename V, typename T>
QK_INLINE void backward_any(const FakeQuantBackwardRun& run) {
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(run.out) | static_cast<uintptr_t>(run.out_step) * sizeof(T);
  run.stream&& places % 64 == 0 ? backward_with<V, T, true>(run) : backward_with<V, T, false>(run);
}
