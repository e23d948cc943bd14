// The loops over windows and their taps. Include it inside the target region of a kernel file,
// inside its anonymous namespace, so that it is compiled for that target.

// Calls f(tap) for all taps of the first box, `base` standing for its base.
template <typename F>
QK_INLINE void for_each_tap(const PoolWindows& windows, const uint8_t* base, const F& f) {
  for (int64_t d = 0; d < windows.taps[0]; ++d) {
    for (int64_t h = 0; h < windows.taps[1]; ++h) {
      const uint8_t* tap = base + d * windows.stride[0] + h * windows.stride[1];
      for (int64_t w = 0; w < windows.taps[2]; ++w, tap += windows.stride[2]) f(tap);
    }
  }
}

// Calls f(box) for each box.
template <typename F>
QK_INLINE void for_each_window(PoolWindows windows, const F& f) {
  for (; windows.count > 0; --windows.count) {
    f(windows);
    windows.base += windows.step;
    windows.out += windows.out_step;
  }
}
