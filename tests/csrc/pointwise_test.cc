// quantize, dequantize, fake_quant, lookup, add, mul and the pools: every kernel equals the scalar
// one for every length around its vectors, with an unreadable page on either side of each buffer.
#include "csrc/pointwise/pointwise.h"

#include <cmath>
#include <limits>

#include "csrc/fake_quant/fake_quant.h"
#include "csrc/pool/pool.h"
#include "csrc/quantize/quantize.h"
#include "tests/csrc/check.h"

using namespace qk;
using namespace qk::test;

namespace {

constexpr FloatType kFloatTypes[] = {FloatType::kFloat32, FloatType::kBFloat16,
                                     FloatType::kFloat16};
constexpr Touches kSides[] = {Touches::kEnd, Touches::kStart};

// Random values of a float type: ties, NaN, infinities and extremes among them.
void fill_floats(Guarded<uint8_t>& x, FloatType type, Rng& rng) {
  const float inf = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < x.size() / float_bytes(type); ++i) {
    const float v = rng.chance(0.2)   ? rng.pick({inf, -inf, std::nanf(""), 3e38f, -3e38f, -0.0f})
                    : rng.chance(0.3) ? static_cast<float>(rng.integer(-300, 300)) * 0.25f + 0.125f
                                      : rng.real(-40, 40);
    uint8_t* p = x.data() + i * float_bytes(type);
    if (type == FloatType::kFloat32) std::memcpy(p, &v, 4);
    BFloat16 b;
    from_float(v, &b);
    if (type == FloatType::kBFloat16) std::memcpy(p, &b, 2);
    Float16 h;
    from_float(v, &h);
    if (type == FloatType::kFloat16) std::memcpy(p, &h, 2);
  }
}

struct Channels {
  Guarded<float> scale, inv_scale;
  Guarded<int32_t> zero_point;

  Channels(int64_t n, Touches side, int32_t qmin, int32_t qmax, Rng& rng)
      : scale(n, side), inv_scale(n, side), zero_point(n, side) {
    for (int64_t i = 0; i < n; ++i) {
      scale[i] = rng.chance(0.5) ? 0.25f : rng.real(0.01f, 0.5f);
      inv_scale[i] = 1.0f / scale[i];
      zero_point[i] = static_cast<int32_t>(rng.integer(qmin, qmax));
    }
  }
};

void grid_kernels_equal_scalar(Rng& rng) {
  for (FloatType type : kFloatTypes) {
    for (int64_t n = 1; n <= 150; ++n) {
      const Touches side = kSides[rng.integer(0, 1)];
      const bool is_signed = rng.chance(0.5), per_element = rng.chance(0.5);
      const int32_t qmin = is_signed ? -128 : 0;
      const int32_t qmax = qmin + (rng.chance(0.5) ? 255 : 15);
      CONTEXT("type=", type, " n=", n, " signed=", is_signed, " per_element=", per_element);
      const Channels channels(per_element ? n : 1, side, qmin, qmax, rng);
      const GridSpan span{channels.scale.data(), channels.inv_scale.data(),
                          channels.zero_point.data(), per_element};
      Guarded<uint8_t> x(n * float_bytes(type), side), q(n, side), expected_q(n, side);
      fill_floats(x, type, rng);
      QuantizeRun quantize_run{x.data(), expected_q.data(), n, span, is_signed, qmin, qmax};
      select_quantize_kernel(type, kCpuScalar)(quantize_run);
      quantize_run.q = q.data();
      select_quantize_kernel(type)(quantize_run);
      CHECK(same_bytes(q.data(), expected_q.data(), n));

      Guarded<uint8_t> y(x.size(), side), expected_y(x.size(), side);
      rng.fill(q);
      DequantizeRun dequantize_run{
          q.data(), expected_y.data(), n, span, is_signed ? CodeType::kInt8 : CodeType::kUInt8,
          false};
      select_dequantize_kernel(type, kCpuScalar)(dequantize_run);
      dequantize_run.x = y.data();
      dequantize_run.stream = rng.chance(0.5);
      select_dequantize_kernel(type)(dequantize_run);
      stream_fence();
      CHECK(same_bytes(y.data(), expected_y.data(), y.size()));

      FakeQuantRun fake_run{x.data(), expected_y.data(), n, span, qmin, qmax, false};
      select_fake_quant_kernel(type, kCpuScalar)(fake_run);
      fake_run.y = y.data();
      fake_run.stream = rng.chance(0.5);
      select_fake_quant_kernel(type)(fake_run);
      stream_fence();
      CHECK(same_bytes(y.data(), expected_y.data(), y.size()));
    }
  }
}

void lookup_equals_scalar(Rng& rng, LookupKernel kernel) {
  Guarded<uint8_t> table(256);
  for (int64_t n = 0; n <= 200; ++n) {
    const Touches side = kSides[n % 2];
    const int64_t rows = rng.integer(1, 3), out_stride = n + rng.integer(0, 5);
    CONTEXT("n=", n, " rows=", rows);
    Guarded<uint8_t> q(rows * n, side), out((rows - 1) * out_stride + n, side),
        expected(out.size(), side);
    rng.fill(q);
    rng.fill(table);
    LookupRows run{q.data(), expected.data(), table.data(), rows, n, n, out_stride};
    lookup_scalar(run);
    run.out = out.data();
    kernel(run);
    CHECK(same_bytes(out.data(), expected.data(), out.size()));
  }
}

void binary_equals_scalar(Rng& rng) {
  for (BinaryOp op : {BinaryOp::kAdd, BinaryOp::kMul}) {
    for (int64_t n = 1; n <= 200; ++n) {
      BinaryGrid grid{};
      grid.a_signed = rng.chance(0.5);
      grid.b_signed = rng.chance(0.5);
      grid.out_signed = rng.chance(0.5);
      grid.a_scale = rng.pick({0.25f, 0.031f, 1e-20f});
      grid.b_scale = rng.pick({0.5f, 0.017f, 1e20f});
      grid.out_scale = rng.pick({0.5f, 0.023f, 1e-30f});
      const auto any = [&](bool is_signed) {
        return static_cast<int32_t>(rng.integer(is_signed ? -128 : 0, is_signed ? 127 : 255));
      };
      grid.a_zero_point = any(grid.a_signed);
      grid.b_zero_point = any(grid.b_signed);
      grid.out_zero_point = any(grid.out_signed);
      grid.qmin = rng.chance(0.5) ? grid.out_zero_point : grid.out_signed ? -128 : 0;
      grid.qmax = grid.out_signed ? 127 : 255;
      const bool a_repeats = rng.chance(0.2), b_repeats = !a_repeats && rng.chance(0.3);
      const Touches side = kSides[n % 2];
      CONTEXT("op=", op, " n=", n, " repeats=", a_repeats, b_repeats);
      Guarded<uint8_t> a(a_repeats ? 1 : n, side), b(b_repeats ? 1 : n, side), out(n, side),
          expected(n, side);
      rng.fill(a);
      rng.fill(b);
      BinaryRun run{a.data(), b.data(), expected.data(), n, a_repeats, b_repeats, &grid};
      select_binary_kernel(op, kCpuScalar)(run);
      run.out = out.data();
      select_binary_kernel(op)(run);
      CHECK(same_bytes(out.data(), expected.data(), n));
    }
  }
}

// Rows of which either operand, both or none is one code; an unreadable page lies behind that code.
void binary_repeats_either_operand_or_both(Rng& rng) {
  for (int turn = 0; turn < 120; ++turn) {
    const int64_t rows = rng.integer(1, 4), n = rng.integer(1, 150);
    const bool a_repeats = rng.chance(0.5), b_repeats = rng.chance(0.5);
    const BinaryOp op = rng.chance(0.5) ? BinaryOp::kAdd : BinaryOp::kMul;
    CONTEXT("op=", op, " rows=", rows, " n=", n, " repeats=", a_repeats, b_repeats);
    const Touches side = kSides[turn % 2];
    const int64_t a_row = a_repeats ? 1 : n, b_row = b_repeats ? 1 : n;
    Guarded<uint8_t> a(rows * a_row, side), b(rows * b_row, side), out(rows * n, side);
    Guarded<uint8_t> expected(rows * n);
    rng.fill(a);
    rng.fill(b);
    BinaryArgs args{};
    args.op = op;
    args.a = a.data();
    args.b = b.data();
    args.out = out.data();
    args.grid = {.a_signed = rng.chance(0.5),
                 .b_signed = rng.chance(0.5),
                 .out_signed = false,
                 .a_scale = 0.25f,
                 .b_scale = 0.5f,
                 .out_scale = 0.75f,
                 .a_zero_point = 10,
                 .b_zero_point = 20,
                 .out_zero_point = 30,
                 .qmin = 0,
                 .qmax = 255};
    const int64_t row_elements[3] = {n, a_row, b_row};
    args.layout.dims = 2;
    args.layout.size[0] = rows;
    args.layout.size[1] = n;
    for (int k = 0; k < 3; ++k) {
      args.layout.stride[k][0] = row_elements[k];
      args.layout.stride[k][1] = row_elements[k] == n ? 1 : 0;
    }
    for (int64_t row = 0; row < rows; ++row) {
      select_binary_kernel(op, kCpuScalar)({.a = a.data() + row * a_row,
                                            .b = b.data() + row * b_row,
                                            .out = expected.data() + row * n,
                                            .n = n,
                                            .a_repeats = a_repeats,
                                            .b_repeats = b_repeats,
                                            .grid = &args.grid});
    }
    binary(args, kSerial);
    CHECK(same_bytes(out.data(), expected.data(), rows * n));
  }
}

void pools_equal_scalar(Rng& rng) {
  for (int64_t channels = 1; channels <= 330; channels += channels < 70 ? 1 : 13) {
    const int64_t taps[3] = {rng.integer(0, 2), rng.integer(1, 4), rng.integer(1, 5)};
    const bool many = channels % 8 == 0;  // enough taps for the 16-bit sums to be flushed
    const int64_t wide = many ? 300 : taps[2], count = rng.integer(1, 11);
    const int64_t shift = rng.integer(1, 3), width = wide + (count - 1) * shift;
    CONTEXT("channels=", channels, " taps=", taps[0], "x", taps[1], "x", wide, " windows=", count);
    const Touches side = kSides[channels % 2];
    const int64_t outputs = count * channels;
    Guarded<uint8_t> q(taps[0] * taps[1] * width * channels, side), out(outputs, side),
        expected(outputs, side);
    rng.fill(q);
    PoolWindows windows{.base = q.data(),
                        .taps = {taps[0], taps[1], wide},
                        .stride = {taps[1] * width * channels, width * channels, channels},
                        .channels = channels,
                        .out = expected.data(),
                        .count = count,
                        .step = shift * channels,
                        .out_step = channels};
    const bool is_signed = rng.chance(0.5);
    max_pool_scalar(windows, is_signed);
    windows.out = out.data();
    select_max_pool_kernel()(windows, is_signed);
    CHECK(same_bytes(out.data(), expected.data(), outputs));

    const bool out_signed = rng.chance(0.5);
    const int32_t qmin = out_signed ? -128 : 0;
    const MeanGrid grid{.q_signed = is_signed,
                        .out_signed = out_signed,
                        .scale_ratio = rng.pick({0.5f, 1.3f, 40.0f}),
                        .divisor = static_cast<int32_t>(rng.integer(1, 40)),
                        .q_zero_point = is_signed ? -7 : 131,
                        .out_zero_point = qmin + 100,
                        .qmin = qmin,
                        .qmax = qmin + 255};
    windows.out = expected.data();
    avg_pool_scalar(windows, grid);
    windows.out = out.data();
    select_avg_pool_kernel()(windows, grid);
    CHECK(same_bytes(out.data(), expected.data(), outputs));
  }
}

// Windows at the border: no pool reads outside of its input.
void pool_drivers_stay_inside(Rng& rng) {
  for (int i = 0; i < 60; ++i) {
    PoolGeometry g{};
    g.batch = rng.integer(1, 2);
    g.channels = rng.pick({1, 3, 40, 300});
    int64_t inputs = g.batch * g.channels, outputs = inputs;
    for (int d = 0; d < 3; ++d) {
      g.kernel[d] = rng.integer(1, 3);
      g.stride[d] = rng.integer(1, 3);
      g.dilation[d] = rng.integer(1, 2);
      g.padding[d] = rng.integer(0, g.kernel[d] / 2);
      const int64_t extent = g.dilation[d] * (g.kernel[d] - 1) + 1;
      g.in[d] = extent + rng.integer(0, 3);
      g.out[d] = (g.in[d] + 2 * g.padding[d] - extent) / g.stride[d] + 1;
      inputs *= g.in[d];
      outputs *= g.out[d];
    }
    Guarded<uint8_t> q(inputs, kSides[i % 2]), serial(outputs), parallel(outputs, kSides[i % 2]);
    rng.fill(q);
    max_pool({q.data(), serial.data(), true, g}, kSerial);
    max_pool({q.data(), parallel.data(), true, g}, threads(3));
    CHECK(same_bytes(serial.data(), parallel.data(), outputs));
  }
}

// Pools of channels [first, first + channels) of a wider input, into those of a wider output, whose
// other channels keep what they have.
void pools_of_slices_are_those_of_dense_tensors(Rng& rng) {
  for_each_isa([&](Isa) {
    for (const int64_t channels : {1, 3, 40, 64, 70, 300}) {
      PoolGeometry g{.batch = 2,
                     .channels = channels,
                     .in = {1, 9, 11},
                     .out = {1, 5, 6},
                     .adaptive = false,
                     .kernel = {1, 3, 3},
                     .stride = {1, 2, 2},
                     .padding = {0, 1, 1},
                     .dilation = {1, 1, 1}};
      const int64_t more = rng.integer(1, 70), first = rng.integer(0, more);
      const int64_t in_pixels = 2 * 9 * 11, out_pixels = 2 * 5 * 6, stride = channels + more;
      const PoolStrides strides{stride, stride};
      Guarded<uint8_t> q(in_pixels * channels), expected(out_pixels * channels);
      Guarded<uint8_t> wide_q((in_pixels - 1) * stride + first + channels);
      rng.fill(q);
      rng.fill(wide_q);
      for (int64_t i = 0; i < q.size(); ++i) {
        wide_q[i / channels * stride + first + i % channels] = q[i];
      }
      const auto check = [&](auto pool, auto args) {
        Guarded<uint8_t> wide((out_pixels - 1) * stride + first + channels);
        std::fill(wide.begin(), wide.end(), uint8_t{0xa5});
        args.q = q.data();
        args.out = expected.data();
        pool(args, kSerial);
        args.q = wide_q.data() + first;
        args.out = wide.data() + first;
        args.strides = strides;
        pool(args, threads(3));
        for (int64_t i = 0; i < wide.size(); ++i) {
          const int64_t channel = i % stride - first;
          const bool inside = channel >= 0 && channel < channels;
          CHECK_EQ(wide[i], inside ? expected[i / stride * channels + channel] : 0xa5, "byte ", i);
        }
      };
      check(max_pool, MaxPoolArgs{nullptr, nullptr, true, g});
      AvgPoolArgs mean{.q = nullptr,
                       .out = nullptr,
                       .q_signed = false,
                       .out_signed = true,
                       .geometry = g,
                       .count_include_pad = true,
                       .divisor = 0,
                       .scale_ratio = 0.7f,
                       .q_zero_point = 9,
                       .out_zero_point = -3,
                       .qmin = -128,
                       .qmax = 127};
      check(avg_pool, mean);
      mean.geometry.adaptive = true;
      check(avg_pool, mean);
    }
  });
}

// to_float and from_float are inverse on every 16-bit code and round to nearest even between them.
void sixteen_bit_floats_round_trip() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Float16 h{static_cast<uint16_t>(bits)};
    const BFloat16 b{static_cast<uint16_t>(bits)};
    if (!std::isnan(to_float(h))) {
      Float16 again;
      from_float(to_float(h), &again);
      CHECK_EQ(again.bits, h.bits);
    }
    if (!std::isnan(to_float(b))) {
      BFloat16 again;
      from_float(to_float(b), &again);
      CHECK_EQ(again.bits, b.bits);
    }
    if ((bits & 0x7fff) >= 0x7bff) continue;  // the next code is not a number of the same sign
    const Float16 next{static_cast<uint16_t>(bits + 1)};
    Float16 middle;
    from_float((to_float(h) + to_float(next)) * 0.5f, &middle);
    CHECK_EQ(middle.bits, bits % 2 == 0 ? h.bits : next.bits);
  }
}

}  // namespace

int main() {
  sixteen_bit_floats_round_trip();
  for_each_isa([](Isa) {
    Rng rng;
    grid_kernels_equal_scalar(rng);
    binary_equals_scalar(rng);
    binary_repeats_either_operand_or_both(rng);
    pools_equal_scalar(rng);
    pool_drivers_stay_inside(rng);
    pools_of_slices_are_those_of_dense_tensors(rng);
  });
  // Every lookup kernel, also those that a better one hides.
  const CpuFeatures features = cpu_features_supported();
#define QK_BINARY_KERNEL(need, op, name)
#define QK_LOOKUP_KERNEL(need, name)  \
  if (has_features(features, need)) { \
    Rng rng;                          \
    lookup_equals_scalar(rng, name);  \
  }
#include "csrc/pointwise/kernels.inc"
}
