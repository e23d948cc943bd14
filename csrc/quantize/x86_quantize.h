// The kernels of quantize.h for any vector width. Include it inside the target region of a kernel
// file, inside its anonymous namespace.

// Four vectors of codes a step, then one, then some lanes of one.
template <typename V, typename T, bool kPerElement, bool kSigned>
QK_INLINE void quantize_run(const QuantizeRun& run) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr int64_t kLanes = V::kLanes;
  const T* x = static_cast<const T*>(run.x);
  uint8_t* q = static_cast<uint8_t*>(run.q);
  const float* inv_scale = run.grid.inv_scale;
  const int32_t* zero_point = run.grid.zero_point;
  const CodeRange range = code_range(run.qmin, run.qmax);
  const F uniform_inv = V::set(inv_scale[0]);
  const I uniform_zp = V::set_int(zero_point[0]), uniform_zp16 = pack16(uniform_zp, uniform_zp);
  int64_t i = 0;
  for (; i + 4 * kLanes <= run.n; i += 4 * kLanes) {
    I v[4];
    for (int k = 0; k < 4; ++k) {
      const int64_t j = i + kLanes * k;
      v[k] = round_to_int(V::mul(V::get(x + j), kPerElement ? V::get(inv_scale + j) : uniform_inv));
    }
    I zp01 = uniform_zp16, zp23 = uniform_zp16;
    if (kPerElement) {
      const int32_t* zp = zero_point + i;
      zp01 = pack16(V::get_int(zp), V::get_int(zp + kLanes));
      zp23 = pack16(V::get_int(zp + 2 * kLanes), V::get_int(zp + 3 * kLanes));
    }
    V::put_int(q + i, four_codes<kSigned>(v, zp01, zp23, range));
  }
  for (; i + kLanes <= run.n; i += kLanes) {
    const I v =
        round_to_int(V::mul(V::get(x + i), kPerElement ? V::get(inv_scale + i) : uniform_inv));
    const I zp = kPerElement ? V::get_int(zero_point + i) : uniform_zp;
    V::put_codes(q + i, one_codes<kSigned>(v, zp, range), kLanes);
  }
  if (const int64_t left = run.n - i; left > 0) {
    const F inv = kPerElement ? V::get(inv_scale + i, left) : uniform_inv;
    const I zp = kPerElement ? V::get_int(zero_point + i, left) : uniform_zp;
    const I v = round_to_int(V::mul(V::get(x + i, left), inv));
    V::put_codes(q + i, one_codes<kSigned>(v, zp, range), left);
  }
}

template <typename V, typename T>
QK_INLINE void quantize_any(const QuantizeRun& run) {
  if (run.grid.per_element) {
    run.q_signed ? quantize_run<V, T, true, true>(run) : quantize_run<V, T, true, false>(run);
  } else {
    run.q_signed ? quantize_run<V, T, false, true>(run) : quantize_run<V, T, false, false>(run);
  }
}

template <typename V, typename T, bool kPerElement, typename Q>
QK_INLINE void dequantize_run(const DequantizeRun& run) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr int64_t kLanes = V::kLanes;
  const Q* q = static_cast<const Q*>(run.q);
  T* x = static_cast<T*>(run.x);
  const float* scales = run.grid.scale;
  const int32_t* zero_point = run.grid.zero_point;
  const F uniform_scale = V::set(scales[0]);
  const I uniform_zp = V::set_int(zero_point[0]);
  const auto value = [&](int64_t i) __attribute__((always_inline)) {
    const I zp = kPerElement ? V::get_int(zero_point + i) : uniform_zp;
    const F offset = V::to_float(V::sub_int(V::get_codes(q + i), zp));
    return V::mul(offset, kPerElement ? V::get(scales + i) : uniform_scale);
  };
  const auto some = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const I zp = kPerElement ? V::get_int(zero_point + i, n) : uniform_zp;
    const F offset = V::to_float(V::sub_int(V::get_codes(q + i, n), zp));
    V::put(x + i, V::mul(offset, kPerElement ? V::get(scales + i, n) : uniform_scale), n);
  };
  int64_t i = 0;
  if (run.stream) {
    // Elements before the first boundary that put_two wants: fewer than two vectors.
    constexpr int64_t kBytes = kLanes == 16 ? 64 : kLanes * static_cast<int64_t>(sizeof(T));
    const uintptr_t address = reinterpret_cast<uintptr_t>(x);
    const int64_t head = static_cast<int64_t>(-address % kBytes / sizeof(T));
    if (address % sizeof(T) == 0 && head < run.n) {
      if (head >= kLanes) {
        V::put(x, value(0));
        i = kLanes;
      }
      if (i < head) some(i, head - i);
      for (i = head; i + 2 * kLanes <= run.n; i += 2 * kLanes) {
        V::template put_two<true>(x + i, value(i), value(i + kLanes));
      }
    }
  }
  for (; i + 4 * kLanes <= run.n; i += 4 * kLanes) {
    F v[4];
    for (int k = 0; k < 4; ++k) v[k] = value(i + kLanes * k);
    V::template put_two<false>(x + i, v[0], v[1]);
    V::template put_two<false>(x + i + 2 * kLanes, v[2], v[3]);
  }
  for (; i + kLanes <= run.n; i += kLanes) V::put(x + i, value(i));
  if (i < run.n) some(i, run.n - i);
}

template <typename V, typename T, bool kPerElement>
QK_INLINE void dequantize_codes(const DequantizeRun& run) {
  switch (run.q_type) {
    case CodeType::kUInt8:
      return dequantize_run<V, T, kPerElement, uint8_t>(run);
    case CodeType::kInt8:
      return dequantize_run<V, T, kPerElement, int8_t>(run);
    case CodeType::kInt32:
      return dequantize_run<V, T, kPerElement, int32_t>(run);
  }
}

template <typename V, typename T>
QK_INLINE void dequantize_any(const DequantizeRun& run) {
  run.grid.per_element ? dequantize_codes<V, T, true>(run) : dequantize_codes<V, T, false>(run);
}
