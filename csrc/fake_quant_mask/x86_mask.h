// fake_quant with its bits, and the backward from them, for any vector width. Include it inside the
// target region of a kernel file, inside its anonymous namespace.

template <typename V, typename T, bool kPerElement, bool kStream, bool kCodes>
QK_INLINE bool mask_run(const FakeQuantMaskRun& run) {
  using F = typename V::F;
  constexpr int64_t kLanes = V::kLanes;
  constexpr uint32_t kAll = (1u << kLanes) - 1;
  const T* x = static_cast<const T*>(run.x);
  T* y = static_cast<T*>(run.y);
  uint8_t* mask = run.mask;
  const GridSpan span = run.grid;
  const F qmin = V::set(static_cast<float>(run.qmin)), qmax = V::set(static_cast<float>(run.qmax));
  const F rounder = V::set(kRounder);
  F scale = V::set(span.scale[0]), inv_scale = V::set(span.inv_scale[0]);
  F zp = V::set(static_cast<float>(span.zero_point[0]));
  F lo = V::sub(qmin, zp), hi = V::sub(qmax, zp);
  uint32_t all = kAll;
  int64_t i = 0;
  for (const int64_t n = run.n; i + kLanes <= n; i += kLanes) {
    if constexpr (kPerElement) {
      scale = V::get(span.scale + i);
      inv_scale = V::get(span.inv_scale + i);
      zp = V::get(span.zero_point + i);
      lo = V::sub(qmin, zp);
      hi = V::sub(qmax, zp);
    }
    const F v = V::mul(V::get(x + i), inv_scale);
    const F r = V::round(v);
    const uint32_t bits = V::bits(V::both(V::ge(r, lo), V::le(r, hi)));
    const F bounded = V::min(V::max(v, lo), hi);  // NaN: lo
    const F offset = V::sub(V::add(bounded, rounder), rounder), out = V::mul(offset, scale);
    if constexpr (kCodes) V::put_bytes(run.codes + i, V::add(offset, zp));
    kStream ? V::stream(y + i, out) : V::put(y + i, out);
    all &= bits;
    mask[i / 8] = static_cast<uint8_t>(bits);
    if constexpr (kLanes == 16) mask[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
  }
  return mask_elements<T>(run, i) || all != kAll;
}

template <typename V, typename T>
QK_INLINE bool mask_any(const FakeQuantMaskRun& run) {
  const bool stream = run.stream && reinterpret_cast<uintptr_t>(run.y) % 64 == 0;
  if (run.codes != nullptr) {
    if (run.grid.per_element) return mask_run<V, T, true, false, true>(run);
    return stream ? mask_run<V, T, false, true, true>(run)
                  : mask_run<V, T, false, false, true>(run);
  }
  if (run.grid.per_element) {
    return stream ? mask_run<V, T, true, true, false>(run)
                  : mask_run<V, T, true, false, false>(run);
  }
  return stream ? mask_run<V, T, false, true, false>(run)
                : mask_run<V, T, false, false, false>(run);
}

template <typename V, typename T, bool kStream>
QK_INLINE void pass_run(const MaskBackwardRun& run) {
  constexpr int64_t kLanes = V::kLanes;
  const T* grad = static_cast<const T*>(run.grad);
  T* out = static_cast<T*>(run.out);
  int64_t i = 0;
  for (; i + kLanes <= run.n; i += kLanes) {
    uint32_t bits = run.mask[i / 8];
    if constexpr (kLanes == 16) bits |= uint32_t{run.mask[i / 8 + 1]} << 8;
    V::template copy_where<kStream>(out + i, grad + i, V::from_bits(bits));
  }
  // The mask tells gcc that the tail is short, or it vectorizes it.
  for (int64_t end = i + ((run.n - i) & (kLanes - 1)); i < end; ++i) {
    out[i] = run.mask[i / 8] >> (i % 8) & 1 ? grad[i] : T{};
  }
}

template <typename V, typename T>
QK_INLINE void pass_any(const MaskBackwardRun& run) {
  if (run.stream && reinterpret_cast<uintptr_t>(run.out) % 64 == 0) {
    pass_run<V, T, true>(run);
  } else {
    pass_run<V, T, false>(run);
  }
}
