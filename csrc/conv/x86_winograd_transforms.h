// The transforms of winograd.h in one dimension, on vectors of any width. Include it inside a
// target region, inside the anonymous namespace of a kernel file.
//
// Words are vectors of int16, Sums of int32: a type V, and static V add(V, V), V sub(V, V) and
//   V shifted(V, count) to the left.

constexpr int kWindow = kWinogradWindow, kTile = kWinogradTile, kPoints = kWinogradPoints;

// v = B' x.
template <typename Words, typename V = typename Words::V>
QK_INLINE void transform_pixels(const V (&x)[kWindow], V (&v)[kWindow]) {
  const V a = Words::sub(x[4], Words::shifted(x[2], 2));
  const V b = Words::sub(x[3], Words::shifted(x[1], 2));
  const V c = Words::sub(x[4], x[2]), d = Words::sub(x[3], x[1]), twice = Words::add(d, d);
  v[0] = Words::add(Words::shifted(Words::sub(x[0], x[2]), 2), c);
  v[1] = Words::add(a, b);
  v[2] = Words::sub(a, b);
  v[3] = Words::add(c, twice);
  v[4] = Words::sub(c, twice);
  v[5] = Words::sub(Words::sub(x[5], x[3]), Words::shifted(d, 2));
}

// y = A' m.
template <typename Sums, typename V = typename Sums::V>
QK_INLINE void transform_sums(const V (&m)[kWindow], V (&y)[kTile]) {
  const V s = Sums::add(m[1], m[2]), d = Sums::sub(m[1], m[2]);
  const V p = Sums::add(m[3], m[4]), q = Sums::sub(m[3], m[4]);
  y[0] = Sums::add(Sums::add(m[0], s), p);
  y[1] = Sums::add(d, Sums::shifted(q, 1));
  y[2] = Sums::add(s, Sums::shifted(p, 2));
  y[3] = Sums::add(d, Sums::shifted(Sums::add(Sums::shifted(q, 2), m[5]), 1));
}

// The inverse of 9 modulo 2^32: 576 y is 64 * 9 * y.
constexpr int32_t kNinth = 954437177;
