// The kernels of dorefa.h for any vector width. Include it inside the target region of a kernel
// file, inside its anonymous namespace.

template <typename V>
QK_INLINE typename V::I mix_vector(typename V::I h) {
  h = V::xor_int(h, V::template shift_right<16>(h));
  h = V::mul_int(h, V::set_int(static_cast<int32_t>(0x85ebca6bu)));
  h = V::xor_int(h, V::template shift_right<13>(h));
  h = V::mul_int(h, V::set_int(static_cast<int32_t>(0xc2b2ae35u)));
  return V::xor_int(h, V::template shift_right<16>(h));
}

// uniform_noise of elements index, index + 1, ... of a row.
template <typename V>
QK_INLINE typename V::F noise_vector(NoiseKey key, int64_t index) {
  using I = typename V::I;
  const I inner = V::set_int(static_cast<int32_t>(key.inner));
  const I outer = V::set_int(static_cast<int32_t>(key.outer));
  const I counter = V::add_int(V::set_int(static_cast<int32_t>(index)), V::counting());
  const I h = mix_vector<V>(V::add_int(mix_vector<V>(V::xor_int(counter, inner)), outer));
  return V::sub(V::mul(V::to_float(V::template shift_right<8>(h)), V::set(0x1p-24f)), V::set(0.5f));
}

// tanh_float.
template <typename V>
QK_INLINE typename V::F tanh_vector(typename V::F x) {
  using F = typename V::F;
  const F one = V::set(1.0f), a = V::min(V::abs(x), V::set(Tanh::kLimit));
  const F z = V::mul(a, a);
  F p = V::fma(V::set(Tanh::kP5), z, V::set(Tanh::kP4));
  p = V::fma(p, z, V::set(Tanh::kP3));
  p = V::fma(p, z, V::set(Tanh::kP2));
  p = V::fma(p, z, V::set(Tanh::kP1));
  p = V::fma(p, z, V::set(Tanh::kP0));
  const F small = V::fma(V::mul(a, z), p, a);
  const F twice = V::add(a, a), n = V::round(V::mul(twice, V::set(Tanh::kLog2E)));
  const F r = V::fma(n, V::set(-Tanh::kLn2Low), V::fma(n, V::set(-Tanh::kLn2High), twice));
  F q = V::fma(V::set(Tanh::kQ4), r, V::set(Tanh::kQ3));
  q = V::fma(q, r, V::set(Tanh::kQ2));
  q = V::fma(q, r, V::set(Tanh::kQ1));
  q = V::fma(q, r, V::set(Tanh::kQ0));
  const F fraction = V::add(V::fma(V::mul(r, r), q, r), one);
  const F power = V::add(V::mul(fraction, V::exp2_integer(n)), one);
  const F large = V::sub(one, V::div(V::set(2.0f), power));
  return V::with_sign_of(V::select(V::gt(V::set(Tanh::kSmall), a), small, large), x);
}

template <typename V, typename T>
QK_INLINE void dorefa_weight_run(const DorefaWeightRun& run) {
  using F = typename V::F;
  constexpr int64_t kLanes = V::kLanes;
  const T* x = static_cast<const T*>(run.x);
  T* y = static_cast<T*>(run.y);
  const DorefaWeight w = run.weight;
  const F inv_largest = V::set(w.inv_largest), inv_scale = V::set(w.inv_scale);
  const F scale = V::set(w.grid.scale), rounder = V::set(kRounder);
  const F lo = V::set(static_cast<float>(w.grid.qmin - w.grid.zero_point));
  const F hi = V::set(static_cast<float>(w.grid.qmax - w.grid.zero_point));
  int64_t i = 0;
  for (; i + kLanes <= run.n; i += kLanes) {
    const F u = V::mul(tanh_vector<V>(V::get(x + i)), inv_largest);
    const F bounded = V::min(V::max(V::mul(u, inv_scale), lo), hi);
    V::put(y + i, V::mul(V::sub(V::add(bounded, rounder), rounder), scale));
  }
  // The mask tells gcc that the tail is short, or it vectorizes it.
  for (int64_t end = i + ((run.n - i) & (kLanes - 1)); i < end; ++i) {
    dorefa_weight_element<T>(run, i);
  }
}

template <typename V, typename T>
QK_INLINE void dorefa_backward_run(const DorefaBackwardRun& run) {
  using F = typename V::F;
  constexpr int64_t kLanes = V::kLanes;
  constexpr int kSums = kSumLanes / V::kLanes;
  const T* grad = static_cast<const T*>(run.grad);
  const T* x = static_cast<const T*>(run.x);
  T* out = static_cast<T*>(run.out);
  const DorefaWeight w = run.weight;
  const F inv_largest = V::set(w.inv_largest), inv_scale = V::set(w.inv_scale);
  const F one = V::set(1.0f), zero = V::zero();
  const F lo = V::set(static_cast<float>(w.grid.qmin - w.grid.zero_point));
  const F hi = V::set(static_cast<float>(w.grid.qmax - w.grid.zero_point));
  F sums[kSums];
  for (int k = 0; k < kSums; ++k) sums[k] = zero;
  const auto step = [&](int64_t i, F& sum) __attribute__((always_inline)) {
    const F g = V::get(grad + i), t = tanh_vector<V>(V::get(x + i)), u = V::mul(t, inv_largest);
    const F r = V::round(V::mul(u, inv_scale));
    const typename V::M passes = V::both(V::ge(r, lo), V::le(r, hi));
    sum = V::add(sum, V::keep(passes, V::mul(g, u)));
    const F d = V::keep(passes, V::mul(g, inv_largest));
    V::put(out + i, V::mul(d, V::fma(V::sub(zero, t), t, one)));
  };
  int64_t i = 0;
  for (; i + kSumLanes <= run.n; i += kSumLanes) {
    for (int k = 0; k < kSums; ++k) step(i + k * kLanes, sums[k]);
  }
  alignas(64) float lanes[kSumLanes];
  for (int k = 0; k < kSums; ++k) V::put(lanes + k * kLanes, sums[k]);
  for (int64_t end = i + ((run.n - i) & (kSumLanes - 1)); i < end; ++i) {
    dorefa_backward_element<T>(run, i, lanes + i % kSumLanes, 0.0f);
  }
  *run.sum = sum_lanes(lanes);
}

template <typename V, typename T>
QK_INLINE void dorefa_gradient_run(const DorefaGradientRun& run) {
  using F = typename V::F;
  constexpr int64_t kLanes = V::kLanes;
  const T* grad = static_cast<const T*>(run.grad);
  T* out = static_cast<T*>(run.out);
  const F inv = V::set(run.inv), half = V::set(0.5f), twice = V::set(run.twice_largest);
  const F steps = V::set(static_cast<float>(run.steps)), zero = V::zero();
  int64_t i = 0;
  for (; i + kLanes <= run.n; i += kLanes) {
    const F noise = noise_vector<V>(run.key, i);
    const F v = V::add(V::mul(V::add(V::mul(V::get(grad + i), inv), half), steps), noise);
    const F q = V::min(V::max(V::round(v), zero), steps);
    V::put(out + i, V::mul(V::sub(V::div(q, steps), half), twice));
  }
  for (int64_t end = i + ((run.n - i) & (kLanes - 1)); i < end; ++i) {
    dorefa_gradient_element<T>(run, i);
  }
}
