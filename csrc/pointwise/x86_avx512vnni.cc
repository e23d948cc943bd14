// add: 64 codes a step, the tail 16 at a time under masks. mul: the same with exact 16-bit
// differences and 32-bit products. lookup without VBMI: 16 byte
// shuffles on differences of the table (see shuffle_table in x86_avx2.cc for the same idea).
#include "csrc/base/numerics.h"
#include "csrc/base/x86_avx512.h"
#include "csrc/pointwise/pointwise.h"

QK_TARGET_BEGIN(QK_ISA_AVX512VNNI)
namespace qk {
namespace {

using namespace avx512;

// 16 codes as floats; a repeated operand is read once, before the loop.
template <bool kSigned, bool kRepeats>
struct Operand {
  const uint8_t* q;
  __m512 repeated;

  QK_INLINE __m512 widen(__m128i bytes) {
    return _mm512_cvtepi32_ps(kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
  }
  __attribute__((always_inline)) explicit Operand(const uint8_t* q) : q(q) {
    repeated = kRepeats ? widen(_mm_set1_epi8(static_cast<char>(*q))) : _mm512_setzero_ps();
  }
  __attribute__((always_inline)) __m512 full(int64_t i) const {
    return kRepeats ? repeated : widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i)));
  }
  __attribute__((always_inline)) __m512 part(int64_t i, __mmask16 m) const {
    return kRepeats ? repeated : widen(_mm_maskz_loadu_epi8(m, q + i));
  }
};

struct AddFormula {
  __m512 a_scale, a_offset, b_scale, b_offset, inv_scale;

  __attribute__((always_inline)) explicit AddFormula(const BinaryGrid& g)
      : a_scale(_mm512_set1_ps(g.a_scale)),
        a_offset(_mm512_set1_ps(add_offset(g.a_scale, g.a_zero_point))),
        b_scale(_mm512_set1_ps(g.b_scale)),
        b_offset(_mm512_set1_ps(add_offset(g.b_scale, g.b_zero_point))),
        inv_scale(_mm512_set1_ps(1.0f / g.out_scale)) {}
  __attribute__((always_inline)) __m512i operator()(__m512 a, __m512 b) const {
    const __m512 sum =
        _mm512_add_ps(_mm512_fmadd_ps(a, a_scale, a_offset), _mm512_fmadd_ps(b, b_scale, b_offset));
    return round_to_int(_mm512_mul_ps(sum, inv_scale));
  }
};

template <bool kASigned, bool kBSigned, bool kOutSigned, bool kARepeats, bool kBRepeats>
QK_INLINE void add_run(const BinaryRun& run) {
  const BinaryGrid& g = *run.grid;
  const AddFormula formula(g);
  const Operand<kASigned, kARepeats> a(run.a);
  const Operand<kBSigned, kBRepeats> b(run.b);
  const CodeRange range = code_range(g.qmin, g.qmax);
  const __m512i zp = _mm512_set1_epi32(g.out_zero_point), zp16 = pack16(zp, zp);
  int64_t i = 0;
  for (; i + 64 <= run.n; i += 64) {
    __m512i v[4];
    for (int k = 0; k < 4; ++k) v[k] = formula(a.full(i + 16 * k), b.full(i + 16 * k));
    _mm512_storeu_si512(run.out + i, codes64<kOutSigned>(v, zp16, zp16, range));
  }
  for (; i < run.n; i += 16) {
    const __mmask16 m = lanes(run.n - i);
    const __m512i v = formula(a.part(i, m), b.part(i, m));
    _mm_mask_storeu_epi8(run.out + i, m, codes16<kOutSigned>(v, zp, range));
  }
}

template <bool kASigned, bool kBSigned, bool kOutSigned>
QK_INLINE void add_repeats(const BinaryRun& run) {
  if (run.a_repeats) {
    add_run<kASigned, kBSigned, kOutSigned, true, false>(run);
  } else if (run.b_repeats) {
    add_run<kASigned, kBSigned, kOutSigned, false, true>(run);
  } else {
    add_run<kASigned, kBSigned, kOutSigned, false, false>(run);
  }
}

template <bool kASigned, bool kBSigned>
QK_INLINE void add_out(const BinaryRun& run) {
  run.grid->out_signed ? add_repeats<kASigned, kBSigned, true>(run)
                       : add_repeats<kASigned, kBSigned, false>(run);
}

QK_INLINE void add_any(const BinaryRun& run) {
  if (run.grid->a_signed) {
    run.grid->b_signed ? add_out<true, true>(run) : add_out<true, false>(run);
  } else {
    run.grid->b_signed ? add_out<false, true>(run) : add_out<false, false>(run);
  }
}

// 64 codes of one operand. An int8 code plus 128 is its byte with the top bit flipped; a repeated
// operand is read once, before the loop.
template <bool kRepeats>
struct CenteredOperand {
  const uint8_t* q;
  __m512i flip, zero_point, repeated;

  __attribute__((always_inline)) CenteredOperand(const uint8_t* q, bool is_signed, int32_t zp)
      : q(q),
        flip(_mm512_set1_epi8(static_cast<char>(is_signed ? 0x80 : 0))),
        zero_point(_mm512_set1_epi16(static_cast<short>(zp + (is_signed ? 128 : 0)))) {
    repeated = kRepeats ? low(_mm512_set1_epi8(static_cast<char>(*q))) : flip;
  }
  __attribute__((always_inline)) __m512i bytes(int64_t i, __mmask64 m) const {
    if constexpr (kRepeats) return repeated;
    return _mm512_maskz_loadu_epi8(m, q + i);
  }
  // The low and high half of each lane of `bytes`, minus the zero point, in 16 bits.
  __attribute__((always_inline)) __m512i low(__m512i bytes) const {
    const __m512i u = _mm512_xor_si512(bytes, flip);
    return _mm512_sub_epi16(_mm512_unpacklo_epi8(u, _mm512_setzero_si512()), zero_point);
  }
  __attribute__((always_inline)) __m512i high(__m512i bytes) const {
    const __m512i u = _mm512_xor_si512(bytes, flip);
    return _mm512_sub_epi16(_mm512_unpackhi_epi8(u, _mm512_setzero_si512()), zero_point);
  }
  __attribute__((always_inline)) __m512i low_at(__m512i bytes) const {
    if constexpr (kRepeats) return repeated;
    return low(bytes);
  }
  __attribute__((always_inline)) __m512i high_at(__m512i bytes) const {
    if constexpr (kRepeats) return repeated;
    return high(bytes);
  }
};

// 32 products, exact in 32 bits, scaled, rounded and back in 16 bits; all inside lanes of 16 bytes.
QK_INLINE __m512i scaled_products(__m512i a, __m512i b, __m512 multiplier) {
  const __m512i low = _mm512_mullo_epi16(a, b), high = _mm512_mulhi_epi16(a, b);
  const __m512 first = _mm512_cvtepi32_ps(_mm512_unpacklo_epi16(low, high));
  const __m512 second = _mm512_cvtepi32_ps(_mm512_unpackhi_epi16(low, high));
  return pack16(round_to_int(_mm512_mul_ps(first, multiplier)),
                round_to_int(_mm512_mul_ps(second, multiplier)));
}

template <bool kOutSigned, bool kARepeats, bool kBRepeats>
QK_INLINE void mul_run(const BinaryRun& run) {
  const BinaryGrid& g = *run.grid;
  const CenteredOperand<kARepeats> a(run.a, g.a_signed, g.a_zero_point);
  const CenteredOperand<kBRepeats> b(run.b, g.b_signed, g.b_zero_point);
  const __m512 multiplier = _mm512_set1_ps(mul_multiplier(g.a_scale, g.b_scale, g.out_scale));
  const __m512i zp = _mm512_set1_epi16(static_cast<short>(g.out_zero_point));
  const CodeRange range = code_range(g.qmin, g.qmax);
  const auto codes = [&](int64_t i, __mmask64 m) __attribute__((always_inline)) {
    const __m512i x = a.bytes(i, m), y = b.bytes(i, m);
    return pack_codes<kOutSigned>(
        _mm512_adds_epi16(scaled_products(a.low_at(x), b.low_at(y), multiplier), zp),
        _mm512_adds_epi16(scaled_products(a.high_at(x), b.high_at(y), multiplier), zp), range);
  };
  int64_t i = 0;
  for (; i + 64 <= run.n; i += 64) _mm512_storeu_si512(run.out + i, codes(i, ~__mmask64{0}));
  if (i < run.n) {
    const __mmask64 m = byte_lanes(run.n - i);
    _mm512_mask_storeu_epi8(run.out + i, m, codes(i, m));
  }
}

template <bool kOutSigned>
QK_INLINE void mul_repeats(const BinaryRun& run) {
  if (run.a_repeats) {
    mul_run<kOutSigned, true, false>(run);
  } else if (run.b_repeats) {
    mul_run<kOutSigned, false, true>(run);
  } else {
    mul_run<kOutSigned, false, false>(run);
  }
}

// Entry 16 * k + j of the result: table[16 * k + j] xor the entry 16 before it, inside each half.
struct ShuffleTable {
  __m512i part[16];
};

QK_INLINE ShuffleTable shuffle_table(const uint8_t* table) {
  ShuffleTable t;
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * k));
    if (k % 8 != 0) {
      part = _mm_xor_si128(part,
                           _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * (k - 1))));
    }
    t.part[k] = _mm512_broadcast_i32x4(part);
  }
  return t;
}

// A shuffle gives 0 where the index is negative: the index falls by 16 a part, so that the parts up
// to the right one are summed, and their differences telescope to the entry.
QK_INLINE __m512i shuffle_lookup(const ShuffleTable& t, __m512i q) {
  const __m512i step = _mm512_set1_epi8(16);
  __m512i low = q, high = _mm512_xor_si512(q, _mm512_set1_epi8(static_cast<char>(0x80)));
  __m512i a = _mm512_shuffle_epi8(t.part[0], low), b = _mm512_shuffle_epi8(t.part[8], high);
#pragma GCC unroll 8
  for (int k = 1; k < 8; ++k) {
    low = _mm512_subs_epi8(low, step);
    high = _mm512_subs_epi8(high, step);
    a = _mm512_xor_si512(a, _mm512_shuffle_epi8(t.part[k], low));
    b = _mm512_xor_si512(b, _mm512_shuffle_epi8(t.part[8 + k], high));
    __asm__("" : "+v"(a), "+v"(b));  // keeps gcc from delaying the sums, which spills the table
  }
  return _mm512_xor_si512(a, b);
}

}  // namespace

void add_avx512vnni(const BinaryRun& run) { add_any(run); }
void mul_avx512vnni(const BinaryRun& run) {
  run.grid->out_signed ? mul_repeats<true>(run) : mul_repeats<false>(run);
}

void lookup_avx512vnni(const LookupRows& run) {
  const ShuffleTable table = shuffle_table(run.table);
  for (int64_t row = 0; row < run.rows; ++row) {
    const uint8_t* q = run.q + row * run.q_stride;
    uint8_t* out = run.out + row * run.out_stride;
    for (int64_t i = 0; i < run.n; i += 64) {
      const __mmask64 m = byte_lanes(run.n - i);
      _mm512_mask_storeu_epi8(out + i, m, shuffle_lookup(table, _mm512_maskz_loadu_epi8(m, q + i)));
    }
  }
}

}  // namespace qk
QK_TARGET_END
