// igemm: every ISA equals the formula of igemm.h taken from the canonical weight, with an
// unreadable page behind every buffer.
#include <algorithm>
#include <array>

#include "csrc/gemm/byte_steps.h"
#include "csrc/gemm/igemm.h"
#include "csrc/gemm/linear.h"
#include "tests/csrc/check.h"

using namespace qk;
using namespace qk::test;

namespace {

// Uniform over int8; few of them large, as trained ones; so, but the last column all 127; at what
// an int16 holds of two or of four products.
enum class Weights { kUniform, kFewLarge, kLastLarge, kAtLimit };

struct Case {
  int64_t m, n, taps, depth;
  OutputType output = OutputType::kU8;
  bool input_signed = false, indirect = false, weight_zero_points = false;
  bool table = false, residual = false, residual_signed = false, scattered = false;
  bool extremes = false;  // all values at an end of their type
  float output_scale = 0.01f;
  bool per_tensor = false;
  bool centred = false;    // the input's zero point is 0
  bool highest = false;    // all of the input at the upper end of its type
  bool unclamped = false;  // every code is an output
  bool from_zero = false;  // the output's zero point is the least code
  Weights weights = Weights::kUniform;
};

std::string describe(const Case& c) {
  return text_of("M=", c.m, " N=", c.n, " taps=", c.taps, " depth=", c.depth, " output=", c.output,
                 " signed=", c.input_signed, " indirect=", c.indirect, " zw=", c.weight_zero_points,
                 " table=", c.table, " residual=", c.residual,
                 " residual_signed=", c.residual_signed, " scattered=", c.scattered,
                 " extremes=", c.extremes, " output_scale=", c.output_scale,
                 " unclamped=", c.unclamped, " from_zero=", c.from_zero,
                 " weights=", static_cast<int>(c.weights));
}

// Weights in the layout of an ISA.
struct Packed {
  Packed(const PackSource& source, Isa isa)
      : bytes(packed_igemm_bytes(source.n, source.taps, source.depth, isa)) {
    CHECK_EQ(bytes.size() % kPackedAlign, 0);
    CHECK_EQ(pack_igemm(source, isa, bytes.data()), Status::kOk);
  }
  PackedMatrix view() const {
    PackedMatrix matrix;
    CHECK_EQ(view_packed(bytes.data(), bytes.size(), &matrix), Status::kOk);
    return matrix;
  }
  Guarded<uint8_t> bytes;
};

// sum over k of (byte(a) - za) * (w - zw), fast where everything else is instrumented.
[[gnu::optimize("O3"), gnu::no_sanitize("address", "undefined")]]
int64_t dot(const uint8_t* a, const int8_t* w, int64_t count, bool is_signed, int32_t za,
            int32_t zw) {
  int64_t sum = 0;
  for (const uint8_t* end = a + count; a != end; ++a, ++w) {
    sum += (byte_value(*a, is_signed) - za) * (*w - zw);
  }
  return sum;
}

// Operands and the expected output; the same for every ISA.
class Problem {
 public:
  Problem(const Case& c, Rng& rng)
      : c_(c),
        k_(c.taps * c.depth),
        a_stride_(k_ + rng.integer(0, 5)),
        out_stride_(c.n * output_bytes(c.output)),
        a_(c.m == 0 || k_ == 0 ? 0 : (c.m - 1) * a_stride_ + k_),
        weight_(static_cast<size_t>(c.n * k_)),
        scales_(static_cast<size_t>(c.per_tensor ? 1 : c.n)),
        zero_points_(scales_.size()),
        bias_(static_cast<size_t>(c.n)),
        residual_(c.residual ? c.m * c.n : 0) {
    rng.fill(a_);
    rng.fill(weight_);
    rng.fill(residual_);
    if (c.weights == Weights::kFewLarge || c.weights == Weights::kLastLarge) {
      for (int8_t& v : weight_) {
        v = static_cast<int8_t>(rng.chance(0.02) ? v : v * rng.integer(0, 40) / 128);
      }
      if (c.weights == Weights::kLastLarge) std::fill(weight_.end() - k_, weight_.end(), 127);
    } else if (c.weights == Weights::kAtLimit) {
      for (int8_t& v : weight_) v = rng.pick<int8_t>({0, 0, 0, 0, 0, 0, 0, 1, 64, -64, 127, -128});
    }
    if (c.extremes) {
      for (uint8_t& v : a_) v = c.input_signed ? 0x80 : 0xff;
      for (int8_t& v : weight_) v = rng.pick<int8_t>({-128, -128, 127});
    }
    if (c.highest) {
      for (uint8_t& v : a_) v = c.input_signed ? 0x7f : 0xff;
    }
    for (float& s : scales_) s = rng.real(0.001f, 0.02f);
    for (int32_t& z : zero_points_) {
      z = c.weight_zero_points ? static_cast<int32_t>(rng.integer(-128, 127)) : 0;
    }
    for (float& b : bias_) b = rng.real(-2, 2);
    source_ = {.weight = weight_.data(),
               .n = c.n,
               .taps = c.taps,
               .depth = c.depth,
               .stride_n = k_,
               .stride_tap = c.depth,
               .stride_k = 1,
               .weight_scale = scales_.data(),
               .weight_zero_point = c.weight_zero_points ? zero_points_.data() : nullptr,
               .per_tensor = c.per_tensor,
               .bias = bias_.data(),
               .input_scale = rng.real(0.01f, 0.1f),
               .input_zero_point = static_cast<int32_t>(c.input_signed ? rng.integer(-128, 127)
                                                                       : rng.integer(0, 255)),
               .input_signed = c.input_signed,
               .output_scale = c.output_scale,
               .epilogue = {}};
    if (c.centred) source_.input_zero_point = 0;
    Epilogue& e = source_.epilogue;
    e.output = c.output;
    const int32_t low = c.output == OutputType::kS8 ? -128 : 0;
    e.qmin = low + static_cast<int32_t>(rng.integer(0, 20));
    e.qmax = low + 255 - static_cast<int32_t>(rng.integer(0, 20));
    if (c.unclamped) e.qmin = low, e.qmax = low + 255;
    e.zero_point = c.from_zero ? e.qmin : static_cast<int32_t>(rng.integer(e.qmin, e.qmax));
    e.has_table = c.table;
    e.has_residual = c.residual;
    for (uint8_t& entry : e.table) entry = static_cast<uint8_t>(rng.bits());
    e.residual = {0.02f,         -0.02f * 7, 0.03f,   -0.03f * 9,
                  1.0f / 0.031f, low + 77,   low + 3, low + 250};
    if (c.unclamped) e.residual.qmin = low, e.residual.qmax = low + 255;
    out_rows_ = std::vector<int64_t>(static_cast<size_t>(c.m));
    for (int64_t r = 0; r < c.m; ++r) out_rows_[r] = c.scattered ? c.m - 1 - r : r;
    expect();
  }

  const PackSource& source() const { return source_; }

  void check(Isa isa) const {
    const Packed packed(source_, isa);
    const PackedMatrix matrix = packed.view();

    // Each tap of each row in a buffer of its own when the rows are indirect.
    std::vector<const uint8_t*> pointers;
    if (c_.indirect || c_.taps != 1) {
      for (int64_t r = 0; r < c_.m; ++r) {
        for (int64_t t = 0; t < c_.taps; ++t) {
          pointers.push_back(a_.data() + r * a_stride_ + t * c_.depth);
        }
      }
    }
    std::vector<int64_t> offsets, residual_offsets;
    for (int64_t r = 0; r < c_.m; ++r) {
      offsets.push_back(out_rows_[r] * out_stride_);
      residual_offsets.push_back(out_rows_[r] * c_.n);
    }
    Guarded<uint8_t> out(c_.m * out_stride_);
    const int64_t panels = panel_count(c_.n, isa);
    IgemmArgs args{.matrix = matrix,
                   .a = a_.data(),
                   .a_row_stride = a_stride_,
                   .pointers = pointers.empty() ? nullptr : pointers.data(),
                   .row_begin = 0,
                   .row_end = c_.m,
                   .panel_begin = 0,
                   .panel_end = panels,
                   .out = out.data(),
                   .out_row_stride = out_stride_,
                   .out_row_offset = c_.scattered ? offsets.data() : nullptr,
                   .residual = residual_.data(),
                   .residual_row_stride = c_.n,
                   .residual_row_offset = c_.scattered ? residual_offsets.data() : nullptr,
                   .residual_signed = c_.residual_signed,
                   .next = {}};
    // In two parts, so that ranges that begin in the middle are covered.
    const int64_t row_cut = c_.m / 3, panel_cut = panels / 2;
    for (const auto& [r0, r1] : {std::pair{int64_t{0}, row_cut}, std::pair{row_cut, c_.m}}) {
      for (const auto& [p0, p1] :
           {std::pair{int64_t{0}, panel_cut}, std::pair{panel_cut, panels}}) {
        args.row_begin = r0, args.row_end = r1, args.panel_begin = p0, args.panel_end = p1;
        igemm(args);
      }
    }
    for (int64_t i = 0; i < out.size(); ++i) {
      CHECK_EQ(out[i], expected_[i], "at byte ", i, " with ", describe(c_));
    }
  }

  // The residual lies where the output does, and other weights are fetched ahead.
  void check_in_place(Isa isa) const {
    const Packed packed(source_, isa);
    const PackedMatrix matrix = packed.view();
    if (!igemm_adds_in_place(*matrix.header)) return;
    Guarded<uint8_t> out(c_.m * c_.n);
    std::memcpy(out.data(), residual_.data(), static_cast<size_t>(c_.m * c_.n));
    igemm({.matrix = matrix,
           .a = a_.data(),
           .a_row_stride = a_stride_,
           .row_end = c_.m,
           .panel_end = panel_count(c_.n, isa),
           .out = out.data(),
           .out_row_stride = out_stride_,
           .residual = out.data(),
           .residual_row_stride = c_.n,
           .residual_signed = c_.residual_signed,
           .next = first_weights(matrix)});
    CHECK(same_bytes(out.data(), expected_.data(), out.size()), describe(c_), " in place");
  }

  // AMX's layout, which AVX512-VNNI's kernel reads where tiles would be mostly empty.
  void check_amx_layout() const {
    const Packed packed(source_, Isa::kAmx);
    const uint8_t* base = packed.bytes.data();
    const auto* header = reinterpret_cast<const PackedHeader*>(base);
    PackedMatrix matrix;
    matrix.header = header;
    matrix.panels = reinterpret_cast<const int8_t*>(base + header->panels_offset);
    matrix.init = reinterpret_cast<const int32_t*>(base + header->init_offset);
    matrix.addend = reinterpret_cast<const float*>(base + header->addend_offset);
    matrix.mult = reinterpret_cast<const float*>(base + header->mult_offset);
    Guarded<uint8_t> out(c_.m * out_stride_);
    const IgemmArgs args{.matrix = matrix,
                         .a = a_.data(),
                         .a_row_stride = a_stride_,
                         .row_end = c_.m,
                         .panel_end = panel_count(c_.n, Isa::kAmx),
                         .out = out.data(),
                         .out_row_stride = out_stride_,
                         .residual = residual_.data(),
                         .residual_row_stride = c_.n,
                         .residual_signed = c_.residual_signed,
                         .next = {}};
    igemm_avx512vnni({args, 0, c_.m, 0, args.panel_end, nullptr});
    CHECK(same_bytes(out.data(), expected_.data(), out.size()), describe(c_), " AMX layout");
  }

  // Rows in runs that share the pointers of their first.
  void check_runs(Isa isa, int64_t run) const {
    const Packed packed(source_, isa);
    const PackedMatrix matrix = packed.view();
    std::vector<const uint8_t*> pointers;
    for (int64_t r = 0; r < c_.m; r += run) {
      for (int64_t t = 0; t < c_.taps; ++t) {
        pointers.push_back(a_.data() + r * a_stride_ + t * c_.depth);
      }
    }
    Guarded<uint8_t> out(c_.m * out_stride_);
    igemm({.matrix = matrix,
           .a_row_stride = a_stride_,
           .pointers = pointers.data(),
           .run = run,
           .row_end = c_.m,
           .panel_end = panel_count(c_.n, isa),
           .out = out.data(),
           .out_row_stride = out_stride_,
           .residual = residual_.data(),
           .residual_row_stride = c_.n,
           .residual_signed = c_.residual_signed,
           .next = {}});
    CHECK(same_bytes(out.data(), expected_.data(), out.size()), describe(c_), " run=", run);
  }

  void check_linear(Isa isa, const Parallel& parallel) const {
    const Packed packed(source_, isa);
    const PackedMatrix matrix = packed.view();
    Guarded<uint8_t> out(c_.m * out_stride_);
    linear({matrix, a_.data(), c_.m, a_stride_, out.data(), nullptr, 0, false}, parallel);
    CHECK(same_bytes(out.data(), expected_.data(), out.size()), describe(c_),
          " threads=", parallel.threads);

    const float unit = 0.037f;
    const int32_t zero = 11;
    Guarded<float> floats(c_.m * c_.n);
    LinearArgs args{matrix, a_.data(), c_.m, a_stride_, floats.data(), nullptr, 0, false};
    args.floats = {&unit, &zero, false};
    Guarded<uint8_t> workspace(linear_workspace_bytes(args, parallel));
    args.workspace = workspace.data();
    linear(args, parallel);
    for (int64_t i = 0; i < floats.size(); ++i) {
      CHECK_EQ(floats[i], static_cast<float>(expected_[i] - zero) * unit, describe(c_), " float ",
               i, " threads=", parallel.threads);
    }
  }

 private:
  void expect() {
    expected_.resize(static_cast<size_t>(c_.m * out_stride_));
    const Epilogue& e = source_.epilogue;
    for (int64_t r = 0; r < c_.m; ++r) {
      for (int64_t n = 0; n < c_.n; ++n) {
        const size_t g = c_.per_tensor ? 0 : n;
        const int64_t acc = dot(a_.data() + r * a_stride_, weight_.data() + n * k_, k_,
                                c_.input_signed, source_.input_zero_point, zero_points_[g]);
        const float scale = source_.input_scale * scales_[g];
        const float mult = e.is_8bit() ? scale / source_.output_scale : scale;
        const int64_t row = out_rows_[r];
        store_output(e, static_cast<int32_t>(acc), bias_[n] / scale, mult,
                     expected_.data() + row * out_stride_ + n * output_bytes(e.output),
                     c_.residual ? residual_.data() + row * c_.n + n : nullptr, c_.residual_signed);
      }
    }
  }

  Case c_;
  int64_t k_, a_stride_, out_stride_;
  Guarded<uint8_t> a_;
  std::vector<int8_t> weight_;
  std::vector<float> scales_;
  std::vector<int32_t> zero_points_;
  std::vector<float> bias_;
  Guarded<uint8_t> residual_;
  std::vector<int64_t> out_rows_;
  PackSource source_;
  std::vector<uint8_t> expected_;
};

// Checks a problem under every ISA.
void check_everywhere(const Case& c, Rng& rng) {
  CONTEXT(describe(c));
  const Problem problem(c, rng);
  for_each_isa([&](Isa isa) { problem.check(isa); });
}

void every_small_shape_equals_the_formula() {
  Rng rng(1);
  for (int64_t m = 0; m <= 33; ++m) {
    for (int64_t n = 0; n <= 33; ++n) {
      for (int64_t k = 0; k <= 33; ++k) {
        check_everywhere(
            {.m = m, .n = n, .taps = 1, .depth = k, .input_signed = (m + n + k) % 2 == 1}, rng);
      }
    }
  }
}

void random_problems_equal_the_formula() {
  Rng rng(2);
  for (int i = 0; i < 2000; ++i) {
    Case c{};
    c.m = rng.chance(0.05) ? rng.integer(20, 230) : rng.integer(0, 20);
    c.n = rng.integer(0, 200);
    c.taps = rng.chance(0.5) ? 1 : rng.integer(1, 9);
    c.depth = rng.integer(0, 70);
    c.output = rng.pick({OutputType::kU8, OutputType::kU8, OutputType::kS8, OutputType::kS32,
                         OutputType::kF32, OutputType::kBF16, OutputType::kF16});
    c.input_signed = rng.chance(0.5);
    c.indirect = rng.chance(0.5);
    c.weight_zero_points = rng.chance(0.3);
    const bool bytes = c.output == OutputType::kU8 || c.output == OutputType::kS8;
    c.table = bytes && rng.chance(0.3);
    c.residual = bytes && rng.chance(0.3);
    c.residual_signed = rng.chance(0.5);
    c.scattered = rng.chance(0.3);
    c.per_tensor = rng.chance(0.3);
    c.output_scale = rng.pick({0.001f, 0.01f, 0.5f, 1e-12f});
    check_everywhere(c, rng);
  }
}

void rows_in_runs_equal_the_formula() {
  Rng rng(7);
  for (int i = 0; i < 600; ++i) {
    Case c{};
    const int64_t run = rng.integer(1, rng.chance(0.2) ? 130 : 70), runs = rng.integer(1, 5);
    c.m = run * runs;
    c.n = rng.integer(1, 150);
    c.taps = rng.integer(1, 9);
    c.depth = rng.chance(0.7) ? rng.integer(1, 50) * 4 : rng.integer(1, 200);
    c.input_signed = rng.chance(0.2);
    c.weight_zero_points = rng.chance(0.2);
    c.table = rng.chance(0.2);
    c.residual = rng.chance(0.5);
    c.residual_signed = rng.chance(0.5);
    CONTEXT(describe(c));
    const Problem problem(c, rng);
    for_each_isa([&](Isa isa) {
      if (isa >= Isa::kAvx512Vnni) problem.check_runs(isa, run);
    });
  }
}

// Also that both of AVX2's layouts are taken, and steps of rows in one order and in three.
void weights_that_suit_byte_steps_equal_the_formula() {
  Rng rng(10);
  int64_t taken[kMostOrders + 1] = {};
  for (int i = 0; i < 1200; ++i) {
    Case c{};
    c.m = rng.chance(0.2) ? rng.integer(30, 120) : rng.integer(0, 34);
    c.n = rng.integer(0, 70);
    c.taps = rng.chance(0.6) ? 1 : rng.integer(1, 9);
    c.depth = rng.chance(0.3) ? rng.integer(1, 20) * 16 : rng.integer(0, 150);
    c.output = rng.pick({OutputType::kU8, OutputType::kU8, OutputType::kU8, OutputType::kS8,
                         OutputType::kS8, OutputType::kS32, OutputType::kF32, OutputType::kBF16});
    c.input_signed = rng.chance(0.5);
    c.indirect = rng.chance(0.5);
    c.weight_zero_points = rng.chance(0.2);
    const bool bytes = c.output == OutputType::kU8 || c.output == OutputType::kS8;
    c.table = bytes && rng.chance(0.2);
    c.residual = bytes && rng.chance(0.4);
    c.residual_signed = rng.chance(0.5);
    c.scattered = rng.chance(0.3);
    c.highest = rng.chance(0.5);
    c.unclamped = rng.chance(0.5);
    c.output_scale = rng.pick({0.01f, 0.5f});
    c.weights = rng.chance(0.7) ? Weights::kFewLarge : Weights::kAtLimit;
    CONTEXT(describe(c));
    const Problem problem(c, rng);
    for_each_isa([&](Isa isa) {
      problem.check(isa);
      if (c.residual && c.taps == 1 && !c.scattered) problem.check_in_place(isa);
      if (isa == Isa::kAvx2) ++taken[Packed(problem.source(), isa).view().header->orders];
    });
  }
  if (taken[0] + taken[1] + taken[kMostOrders] == 0) return;
  CHECK(taken[0] > 20 && taken[1] > 20 && taken[kMostOrders] > 20, taken[0], " ", taken[1], " ",
        taken[kMostOrders]);
}

// Panels as wide as their vectors or of 24 columns, few values in a row, bytes that need no clamp.
void whole_panels_of_bytes_equal_the_formula() {
  Rng rng(9);
  for (int i = 0; i < 1500; ++i) {
    Case c{};
    c.m = rng.chance(0.2) ? rng.integer(90, 230) : rng.integer(1, 40);
    c.n = rng.pick({16, 24, 32, 64, 80, 88, 96, 128, 192}) + (rng.chance(0.1) ? 24 : 0);
    c.taps = rng.chance(0.7) ? 1 : rng.integer(2, 4);
    c.depth = rng.chance(0.7) ? rng.integer(1, 66) * 4 : rng.integer(1, 260);
    c.output = rng.chance(0.9) ? OutputType::kU8 : OutputType::kS8;
    c.input_signed = rng.chance(0.2);
    c.residual = rng.chance(0.5);
    c.residual_signed = rng.chance(0.1);
    c.scattered = rng.chance(0.2);
    c.unclamped = rng.chance(0.8);
    c.from_zero = rng.chance(0.5);
    CONTEXT(describe(c));
    const Problem problem(c, rng);
    for_each_isa([&](Isa isa) {
      problem.check(isa);
      if (c.scattered) return;
      if (c.residual && c.taps == 1) problem.check_in_place(isa);
      if (isa < Isa::kAvx512Vnni) return;
      problem.check_runs(isa, c.m % 2 == 0 ? c.m / 2 : c.m);
      if (c.taps == 1) problem.check_amx_layout();
    });
  }
}

void linear_is_the_same_for_any_number_of_threads() {
  Rng rng(6);
  for (const auto& [m, n, k] :
       {std::array{1, 3000, 4096}, {5, 400, 3000}, {700, 70, 512}, {90, 900, 300}}) {
    for (const Weights weights : {Weights::kUniform, Weights::kFewLarge}) {
      const Problem problem({.m = m, .n = n, .taps = 1, .depth = k, .weights = weights}, rng);
      for_each_isa([&](Isa isa) {
        if (isa == Isa::kScalar) return;  // slow
        for (const int count : {1, 2, 3, 8}) problem.check_linear(isa, threads(count));
      });
    }
  }
}

void extreme_values_do_not_saturate() {
  Rng rng(3);
  for (const bool input_signed : {false, true}) {
    for (const int64_t depth : {3, 64, 1021}) {
      for (const OutputType output : {OutputType::kS32, OutputType::kU8}) {
        check_everywhere({.m = 13,
                          .n = 70,
                          .taps = 2,
                          .depth = depth,
                          .output = output,
                          .input_signed = input_signed,
                          .weight_zero_points = true,
                          .extremes = true},
                         rng);
      }
    }
  }
}

void the_k_bound_is_exact() {
  Rng rng(4);
  const Problem largest(
      {.m = 1, .n = 3, .taps = 1, .depth = kMaxKU8S8, .output = OutputType::kS32, .extremes = true},
      rng);
  for_each_isa([&](Isa isa) {
    largest.check(isa);
    PackSource source = largest.source();
    source.depth = kMaxKU8S8 + 1;
    CHECK_EQ(pack_igemm(source, isa, nullptr), Status::kKTooLarge);
    source.idle = 1;
    CHECK_EQ(check_accumulator(source), Status::kOk);
  });
}

// Those of layers of a usual depth: runtimes start threads with little stack.
void rows_fit_a_stack_of_256_kib() {
  Rng rng(10);
  for (const bool input_signed : {false, true}) {
    const Problem problem({.m = 64, .n = 64, .taps = 1, .depth = 256, .input_signed = input_signed},
                          rng);
    for_each_isa([&](Isa isa) {
      const auto check = [&] { problem.check(isa); };
      with_stack(256 * 1024, check);
    });
  }
}

// Rows so long that a kernel which copies them takes fewer at a time.
void long_rows_equal_the_formula() {
  Rng rng(8);
  for (const auto& [n, weights] : {std::pair{7, Weights::kUniform}, {40, Weights::kFewLarge}}) {
    for (const int64_t depth : {1365, 4097, 5000, 10923, 17000, 33000, 40001}) {
      check_everywhere({.m = 31, .n = n, .taps = 1, .depth = depth, .weights = weights}, rng);
    }
  }
  // More single steps than fit into a ByteGroup.
  check_everywhere({.m = 9,
                    .n = 17,
                    .taps = 1,
                    .depth = kMaxKS8S8,
                    .output = OutputType::kS32,
                    .input_signed = true,
                    .centred = true,
                    .weights = Weights::kLastLarge},
                   rng);
  for (const bool highest : {false, true}) {
    const Problem longest({.m = 2,
                           .n = 9,
                           .taps = 1,
                           .depth = kMaxKS8S8,
                           .output = OutputType::kS32,
                           .input_signed = true,
                           .centred = true,
                           .highest = highest},
                          rng);
    for_each_isa([&](Isa isa) { longest.check(isa); });
  }
}

void damaged_headers_are_refused() {
  Rng rng(5);
  const Problem problem({.m = 1, .n = 5, .taps = 1, .depth = 7}, rng);
  for_each_isa([&](Isa isa) {
    const int64_t bytes = packed_igemm_bytes(5, 1, 7, isa);
    Guarded<uint8_t> packed(bytes);
    CHECK_EQ(pack_igemm(problem.source(), isa, packed.data()), Status::kOk);
    auto* header = reinterpret_cast<PackedHeader*>(packed.data());
    const PackedHeader good = *header;
    PackedMatrix view;
    const auto refused = [&](Status status, int64_t size) {
      CHECK_EQ(view_packed(packed.data(), size, &view), status);
      *header = good;
      CHECK_EQ(view_packed(packed.data(), bytes, &view), Status::kOk);
    };
    header->magic ^= 1, refused(Status::kBadMagic, bytes);
    header->version += 1, refused(Status::kBadVersion, bytes);
    header->isa = isa == Isa::kScalar ? Isa::kAvx2 : Isa::kScalar, refused(Status::kBadIsa, bytes);
    header->n += 16, refused(Status::kBadShape, bytes);
    header->depth = -1, refused(Status::kBadShape, bytes);
    header->orders = isa == Isa::kAvx2 ? 2 : 1, refused(Status::kBadShape, bytes);
    refused(Status::kBadShape, bytes - 1);
    refused(Status::kBadMagic, 8);
  });
}

}  // namespace

int main() {
  damaged_headers_are_refused();
  every_small_shape_equals_the_formula();
  random_problems_equal_the_formula();
  rows_in_runs_equal_the_formula();
  whole_panels_of_bytes_equal_the_formula();
  weights_that_suit_byte_steps_equal_the_formula();
  linear_is_the_same_for_any_number_of_threads();
  extreme_values_do_not_saturate();
  the_k_bound_is_exact();
  rows_fit_a_stack_of_256_kib();
  long_rows_equal_the_formula();
  return 0;
}
