// add, mul: 32 codes a step, then 8, then one by one. lookup: 16 byte shuffles on differences of
// the table.
#include "csrc/base/x86_avx2.h"

#include "csrc/base/numerics.h"
#include "csrc/pointwise/pointwise.h"

QK_TARGET_BEGIN(QK_ISA_AVX2)
namespace qk {
namespace {

using namespace avx2;

QK_INLINE int32_t code(uint8_t byte, bool is_signed) {
  return is_signed ? static_cast<int8_t>(byte) : byte;
}

// 8 codes as floats; a repeated operand is read once, before the loop.
template <bool kSigned, bool kRepeats>
struct Operand {
  const uint8_t* q;
  __m256 repeated;

  QK_INLINE __m256 widen(__m128i bytes) {
    return _mm256_cvtepi32_ps(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
  }
  __attribute__((always_inline)) explicit Operand(const uint8_t* q) : q(q) {
    repeated = kRepeats ? widen(_mm_set1_epi8(static_cast<char>(*q))) : _mm256_setzero_ps();
  }
  __attribute__((always_inline)) __m256 full(int64_t i) const {
    return kRepeats ? repeated : widen(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + i)));
  }
  __attribute__((always_inline)) int32_t one(int64_t i) const {
    return code(q[kRepeats ? 0 : i], kSigned);
  }
};

struct AddFormula {
  __m256 a_scale, a_offset, b_scale, b_offset, inv_scale;

  __attribute__((always_inline)) explicit AddFormula(const BinaryGrid& g)
      : a_scale(_mm256_set1_ps(g.a_scale)),
        a_offset(_mm256_set1_ps(add_offset(g.a_scale, g.a_zero_point))),
        b_scale(_mm256_set1_ps(g.b_scale)),
        b_offset(_mm256_set1_ps(add_offset(g.b_scale, g.b_zero_point))),
        inv_scale(_mm256_set1_ps(1.0f / g.out_scale)) {}
  __attribute__((always_inline)) __m256i operator()(__m256 a, __m256 b) const {
    const __m256 sum =
        _mm256_add_ps(_mm256_fmadd_ps(a, a_scale, a_offset), _mm256_fmadd_ps(b, b_scale, b_offset));
    return round_to_int(_mm256_mul_ps(sum, inv_scale));
  }
  QK_INLINE int32_t one(const BinaryGrid& g, int32_t a, int32_t b) {
    return add_codes(a, g.a_scale, add_offset(g.a_scale, g.a_zero_point), b, g.b_scale,
                     add_offset(g.b_scale, g.b_zero_point), 1.0f / g.out_scale, g.out_zero_point,
                     g.qmin, g.qmax);
  }
};

// The product of two differences of codes is exact in float32.
struct MulFormula {
  __m256 a_zero, b_zero, multiplier;

  __attribute__((always_inline)) explicit MulFormula(const BinaryGrid& g)
      : a_zero(_mm256_set1_ps(static_cast<float>(g.a_zero_point))),
        b_zero(_mm256_set1_ps(static_cast<float>(g.b_zero_point))),
        multiplier(_mm256_set1_ps(mul_multiplier(g.a_scale, g.b_scale, g.out_scale))) {}
  __attribute__((always_inline)) __m256i operator()(__m256 a, __m256 b) const {
    const __m256 product = _mm256_mul_ps(_mm256_sub_ps(a, a_zero), _mm256_sub_ps(b, b_zero));
    return round_to_int(_mm256_mul_ps(product, multiplier));
  }
  QK_INLINE int32_t one(const BinaryGrid& g, int32_t a, int32_t b) {
    return mul_codes(a, g.a_zero_point, b, g.b_zero_point,
                     mul_multiplier(g.a_scale, g.b_scale, g.out_scale), g.out_zero_point, g.qmin,
                     g.qmax);
  }
};

template <typename Formula, bool kASigned, bool kBSigned, bool kOutSigned, bool kARepeats,
          bool kBRepeats>
QK_INLINE void binary_run(const BinaryRun& run) {
  const BinaryGrid& g = *run.grid;
  const Formula formula(g);
  const Operand<kASigned, kARepeats> a(run.a);
  const Operand<kBSigned, kBRepeats> b(run.b);
  const CodeRange range = code_range(g.qmin, g.qmax);
  const __m256i zp = _mm256_set1_epi32(g.out_zero_point), zp16 = pack16(zp, zp);
  int64_t i = 0;
  for (; i + 32 <= run.n; i += 32) {
    __m256i v[4];
    for (int k = 0; k < 4; ++k) v[k] = formula(a.full(i + 8 * k), b.full(i + 8 * k));
    store256(run.out + i, codes32<kOutSigned>(v, zp16, zp16, range));
  }
  for (; i + 8 <= run.n; i += 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(run.out + i),
                     codes8<kOutSigned>(formula(a.full(i), b.full(i)), zp, range));
  }
  for (; i < run.n; ++i) {
    run.out[i] = static_cast<uint8_t>(Formula::one(g, a.one(i), b.one(i)));
  }
}

template <typename Formula, bool kASigned, bool kBSigned, bool kOutSigned>
QK_INLINE void binary_repeats(const BinaryRun& run) {
  if (run.a_repeats) {
    binary_run<Formula, kASigned, kBSigned, kOutSigned, true, false>(run);
  } else if (run.b_repeats) {
    binary_run<Formula, kASigned, kBSigned, kOutSigned, false, true>(run);
  } else {
    binary_run<Formula, kASigned, kBSigned, kOutSigned, false, false>(run);
  }
}

template <typename Formula, bool kASigned, bool kBSigned>
QK_INLINE void binary_out(const BinaryRun& run) {
  run.grid->out_signed ? binary_repeats<Formula, kASigned, kBSigned, true>(run)
                       : binary_repeats<Formula, kASigned, kBSigned, false>(run);
}

template <typename Formula>
QK_INLINE void binary_any(const BinaryRun& run) {
  if (run.grid->a_signed) {
    run.grid->b_signed ? binary_out<Formula, true, true>(run)
                       : binary_out<Formula, true, false>(run);
  } else {
    run.grid->b_signed ? binary_out<Formula, false, true>(run)
                       : binary_out<Formula, false, false>(run);
  }
}

// Entry 16 * k + j: table[16 * k + j] xor the entry 16 before it, inside each half.
struct ShuffleTable {
  __m128i part[16];
};

QK_INLINE ShuffleTable shuffle_table(const uint8_t* table) {
  ShuffleTable t;
  for (int k = 0; k < 16; ++k) {
    t.part[k] = load128(table + 16 * k);
    if (k % 8 != 0) t.part[k] = _mm_xor_si128(t.part[k], load128(table + 16 * (k - 1)));
  }
  return t;
}

// A shuffle gives 0 where the index is negative: the index falls by 16 a part, so that the parts up
// to the right one are summed, and their differences telescope to the entry. Two vectors share the
// loads of the table.
QK_INLINE void shuffle_lookup(const ShuffleTable& t, __m256i q[2]) {
  const __m256i step = _mm256_set1_epi8(16), top = _mm256_set1_epi8(static_cast<char>(0x80));
  __m256i low[2], high[2], sum[2];
  for (int j = 0; j < 2; ++j) {
    low[j] = q[j];
    high[j] = _mm256_xor_si256(q[j], top);
    sum[j] = _mm256_setzero_si256();
  }
  for (int k = 0; k < 8; ++k) {
    const __m256i first = _mm256_broadcastsi128_si256(t.part[k]);
    const __m256i second = _mm256_broadcastsi128_si256(t.part[8 + k]);
    for (int j = 0; j < 2; ++j) {
      sum[j] = _mm256_xor_si256(sum[j], _mm256_shuffle_epi8(first, low[j]));
      sum[j] = _mm256_xor_si256(sum[j], _mm256_shuffle_epi8(second, high[j]));
      low[j] = _mm256_subs_epi8(low[j], step);
      high[j] = _mm256_subs_epi8(high[j], step);
    }
  }
  q[0] = sum[0];
  q[1] = sum[1];
}

}  // namespace

void add_avx2(const BinaryRun& run) { binary_any<AddFormula>(run); }
void mul_avx2(const BinaryRun& run) { binary_any<MulFormula>(run); }

void lookup_avx2(const LookupRows& run) {
  const ShuffleTable table = shuffle_table(run.table);
  for (int64_t row = 0; row < run.rows; ++row) {
    const uint8_t* q = run.q + row * run.q_stride;
    uint8_t* out = run.out + row * run.out_stride;
    int64_t i = 0;
    for (; i + 64 <= run.n; i += 64) {
      __m256i v[2] = {load256(q + i), load256(q + i + 32)};
      shuffle_lookup(table, v);
      store256(out + i, v[0]);
      store256(out + i + 32, v[1]);
    }
    for (; i < run.n; ++i) out[i] = run.table[q[i]];
  }
}

}  // namespace qk
QK_TARGET_END
