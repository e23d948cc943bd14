// Include it inside a target region, inside the anonymous namespace of a kernel file.

// Copies n bytes; the last ones may be written twice, nothing further.
QK_INLINE void copy_overlapping(uint8_t* to, const uint8_t* from, int64_t n) {
  if (n >= 16) {
    for (int64_t i = 0; i + 16 <= n; i += 16) __builtin_memcpy(to + i, from + i, 16);
    __builtin_memcpy(to + n - 16, from + n - 16, 16);
  } else if (n >= 8) {
    __builtin_memcpy(to, from, 8);
    __builtin_memcpy(to + n - 8, from + n - 8, 8);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}
