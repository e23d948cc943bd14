// Include it inside a target region, inside the anonymous namespace of a kernel file.

// Copies n < 16 bytes; some may be written twice, nothing further.
QK_INLINE void copy_under_16(uint8_t* to, const uint8_t* from, int64_t n) {
  if (n >= 8) {
    __builtin_memcpy(to, from, 8);
    __builtin_memcpy(to + n - 8, from + n - 8, 8);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

// Copies n bytes; the last ones may be written twice, nothing further.
QK_INLINE void copy_overlapping(uint8_t* to, const uint8_t* from, int64_t n) {
  if (n < 16) return copy_under_16(to, from, n);
  for (int64_t i = 0; i + 16 <= n; i += 16) __builtin_memcpy(to + i, from + i, 16);
  __builtin_memcpy(to + n - 16, from + n - 16, 16);
}

// The taps of each row one after the other, as rows of `pitch` bytes, whose last `kTail` are
// `filler` where no tap is.
template <int kTail>
QK_INLINE void join_taps(const uint8_t* const* taps, int64_t tap_pitch, int64_t rows, int64_t count,
                         int64_t depth, int64_t pitch, uint8_t filler, uint8_t* to) {
  const bool halves = depth >= 8 && depth < 16;
  for (int64_t row = 0; row < rows; ++row, taps += tap_pitch, to += pitch) {
    __builtin_memset(to + pitch - kTail, filler, kTail);
    uint8_t* at = to;
    if (halves) {
      for (int64_t tap = 0; tap < count; ++tap, at += depth) {
        __builtin_memcpy(at, taps[tap], 8);
        __builtin_memcpy(at + depth - 8, taps[tap] + depth - 8, 8);
      }
    } else {
      for (int64_t tap = 0; tap < count; ++tap, at += depth) copy_overlapping(at, taps[tap], depth);
    }
  }
}
