// What training adds: observers, bit masks, many weights in one call, DoReFa and packed signs.
// Every kernel equals the scalar one for every length on either side of a guard page, and no number
// of threads changes a bit.
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "csrc/binary/binary.h"
#include "csrc/dorefa/dorefa.h"
#include "csrc/fake_quant_mask/mask.h"
#include "csrc/foreach/foreach.h"
#include "csrc/observe/observe.h"
#include "tests/csrc/check.h"

using namespace qk;
using namespace qk::test;

namespace {

constexpr int32_t kQmin = -8, kQmax = 7;
constexpr CpuFeatures kScalar = kCpuScalar;

// Random values of a float type that lie in bytes, so that all three types are one test.
struct Floats {
  FloatType type;
  Guarded<uint8_t> bytes;

  Floats(FloatType type, int64_t n, Touches touches)
      : type(type), bytes(n * float_bytes(type), touches) {}

  void set(int64_t i, float v) {
    switch (type) {
      case FloatType::kFloat32:
        return from_float(v, reinterpret_cast<float*>(bytes.data()) + i);
      case FloatType::kBFloat16:
        return from_float(v, reinterpret_cast<BFloat16*>(bytes.data()) + i);
      case FloatType::kFloat16:
        return from_float(v, reinterpret_cast<Float16*>(bytes.data()) + i);
    }
  }
  void fill(Rng& rng, bool hostile) {
    const float inf = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < bytes.size() / float_bytes(type); ++i) {
      set(i, hostile && rng.chance(0.1) ? rng.pick({inf, -inf, std::nanf(""), -0.0f, 1e-42f, 3e38f})
                                        : rng.real(-4, 4));
    }
  }
};

bool same(const Floats& a, const Floats& b) {
  return same_bytes(a.bytes.data(), b.bytes.data(), a.bytes.size());
}

void extremes_equal_scalar(FloatType type, int64_t n, Touches touches, Rng& rng) {
  for (bool per_element : {false, true}) {
    CONTEXT("extremes n=", n, " type=", type, " per_element=", per_element);
    Floats x(type, n, touches);
    x.fill(rng, rng.chance(0.5));
    const int64_t channels = per_element ? n : 1;
    Guarded<float> low[2] = {Guarded<float>(channels, touches), Guarded<float>(channels, touches)};
    Guarded<float> high[2] = {Guarded<float>(channels, touches), Guarded<float>(channels, touches)};
    bool nan[2];
    for (int k : {0, 1}) {
      for (float& v : low[k]) v = 1.0f;
      for (float& v : high[k]) v = -1.0f;
      const MinMaxRun run{x.bytes.data(), n, low[k].data(), high[k].data(), per_element};
      nan[k] = (k == 0 ? select_minmax_kernel(type, kScalar) : select_minmax_kernel(type))(run);
    }
    CHECK_EQ(nan[1], nan[0]);
    for (int64_t c = 0; c < channels; ++c) {  // -0 and +0 are one value
      CHECK_EQ(low[1][c], low[0][c]);
      CHECK_EQ(high[1][c], high[0][c]);
    }
  }
}

// Where a tensor is observed in several parts, a NaN in any of them is found: in the parts of a
// long run, of an outer channel, and in the rows that are folded or dealt out where channels are
// innermost.
void a_nan_in_any_part_is_found() {
  struct Case {
    int64_t outer, channels, inner;
  };
  for (const Case& c : {Case{1, 1, 40000}, Case{3, 2, 20000}, Case{17, 3, 1}, Case{300, 400, 1}}) {
    GridLayout grid;
    StridedLayout<2>& walk = grid.strided;
    const bool innermost = c.inner == 1;
    walk.dims = innermost ? 2 : 3;
    const int64_t sizes[3] = {c.outer, c.channels, c.inner};
    const int64_t strides[3] = {c.channels * c.inner, c.inner, 1};
    for (int d = 0; d < walk.dims; ++d) {
      walk.size[d] = sizes[d];
      walk.stride[0][d] = walk.stride[1][d] = strides[d];
    }
    grid.channel_dim = 1;
    const int64_t size = c.outer * c.channels * c.inner;
    std::vector<float> x(static_cast<size_t>(size), 0.5f), low(static_cast<size_t>(c.channels)),
        high(low), workspace(static_cast<size_t>(minmax_workspace(grid)));
    const MinMaxArgs args{x.data(),    FloatType::kFloat32, grid, c.channels, low.data(),
                          high.data(), workspace.data()};
    CHECK(minmax(args, threads(2)));
    for (const int64_t at : {int64_t{0}, int64_t{5}, size / 3, size / 2, size - 1}) {
      CONTEXT("NaN at ", at, " of ", c.outer, "x", c.channels, "x", c.inner);
      x[static_cast<size_t>(at)] = std::nanf("");
      CHECK(!minmax(args, threads(2)));
      CHECK_EQ(finite_minmax(args).nans, 1);
      x[static_cast<size_t>(at)] = 0.5f;
    }
  }
}

void mask_equals_scalar(FloatType type, int64_t n, Touches touches, Rng& rng) {
  CONTEXT("mask n=", n, " type=", type);
  const bool per_element = rng.chance(0.5);
  const int64_t channels = per_element ? n : 1;
  Guarded<float> scale(channels, touches), inv_scale(channels, touches);
  Guarded<int32_t> zero_point(channels, touches);
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = rng.real(0.05f, 0.5f);
    inv_scale[c] = 1.0f / scale[c];
    zero_point[c] = static_cast<int32_t>(rng.integer(kQmin, kQmax));
  }
  Floats x(type, n, touches), y(type, n, touches), expected(type, n, touches);
  x.fill(rng, true);
  Guarded<uint8_t> mask((n + 7) / 8, touches), expected_mask((n + 7) / 8, touches);
  const bool codes = rng.chance(0.5);
  Guarded<uint8_t> code(n, touches), expected_code(n, touches);
  FakeQuantMaskRun run{.x = x.bytes.data(),
                       .y = expected.bytes.data(),
                       .mask = expected_mask.data(),
                       .codes = codes ? expected_code.data() : nullptr,
                       .n = n,
                       .grid = {scale.data(), inv_scale.data(), zero_point.data(), per_element},
                       .qmin = kQmin,
                       .qmax = kQmax,
                       .stream = false};
  const bool clipped = select_fake_quant_mask_kernel(type, kScalar)(run);
  run.y = y.bytes.data();
  run.mask = mask.data();
  if (codes) run.codes = code.data();
  run.stream = rng.chance(0.5);
  CHECK_EQ(select_fake_quant_mask_kernel(type)(run), clipped);
  CHECK(same(y, expected));
  CHECK(same_bytes(mask.data(), expected_mask.data(), mask.size()));
  CHECK(same_bytes(code.data(), expected_code.data(), n));

  MaskBackwardRun back{x.bytes.data(), mask.data(), expected.bytes.data(), n, false};
  select_mask_backward_kernel(type, kScalar)(back);
  back.out = y.bytes.data();
  back.stream = rng.chance(0.5);
  select_mask_backward_kernel(type)(back);
  CHECK(same(y, expected));
}

void dorefa_equals_scalar(FloatType type, int64_t n, Touches touches, Rng& rng) {
  CONTEXT("dorefa n=", n, " type=", type);
  const DorefaKernels scalar = select_dorefa_kernels(type, kScalar);
  const DorefaKernels kernels = select_dorefa_kernels(type);
  Floats x(type, n, touches), grad(type, n, touches), y(type, n, touches);
  Floats expected(type, n, touches);
  x.fill(rng, false);
  grad.fill(rng, false);
  const DorefaWeight weight = dorefa_constants(4.0f, {1.0f / 7, 0, -7, 7});
  DorefaWeightRun forward{x.bytes.data(), expected.bytes.data(), n, weight};
  scalar.weight(forward);
  forward.y = y.bytes.data();
  kernels.weight(forward);
  CHECK(same(y, expected));

  double sums[2] = {};
  DorefaBackwardRun backward{grad.bytes.data(), x.bytes.data(), expected.bytes.data(), n, weight,
                             &sums[0]};
  scalar.backward(backward);
  backward.out = y.bytes.data();
  backward.sum = &sums[1];
  kernels.backward(backward);
  CHECK(same(y, expected));
  CHECK(same_bytes(&sums[0], &sums[1], 1));

  DorefaGradientRun gradient{.grad = grad.bytes.data(),
                             .out = expected.bytes.data(),
                             .n = n,
                             .twice_largest = 8.0f,
                             .inv = 0.125f,
                             .steps = 15,
                             .key = noise_key(rng.bits(), rng.bits())};
  scalar.gradient(gradient);
  gradient.out = y.bytes.data();
  kernels.gradient(gradient);
  CHECK(same(y, expected));
}

void sign_products_equal_scalar(int64_t words, int64_t count, Touches touches, Rng& rng) {
  CONTEXT("signs words=", words, " segments=", count);
  std::vector<std::unique_ptr<Guarded<uint64_t>>> inputs;
  std::vector<BinarySegment> segments;
  for (int64_t s = 0; s < count; ++s) {
    inputs.push_back(std::make_unique<Guarded<uint64_t>>(words, touches));
    rng.fill(*inputs.back());
    segments.push_back({inputs.back()->data(), s * words, words});
  }
  Guarded<uint64_t> weight(count * words * kBinaryBlock, touches);
  rng.fill(weight);
  Guarded<int32_t> ones(kBinaryBlock, touches), expected(kBinaryBlock, touches);
  select_sign_product_kernel(kScalar)(segments.data(), count, weight.data(), expected.data());
  select_sign_product_kernel()(segments.data(), count, weight.data(), ones.data());
  CHECK(same_bytes(ones.data(), expected.data(), kBinaryBlock));
}

void signs_and_bits_stay_inside(FloatType type, int64_t n, Touches touches, Rng& rng) {
  CONTEXT("sign n=", n, " type=", type);
  Floats x(type, n, touches), grad(type, n, touches), y(type, n, touches);
  x.fill(rng, true);
  grad.fill(rng, false);
  binary_sign({x.bytes.data(), y.bytes.data(), type, n}, kSerial);
  binary_sign_backward(
      {grad.bytes.data(), x.bytes.data(), y.bytes.data(), type, n, rng.chance(0.5)}, kSerial);
  Guarded<uint64_t> bits(binary_words(n), touches);
  binary_pack({.x = x.bytes.data(),
               .type = type,
               .rows = 1,
               .n = n,
               .inner = 1,
               .outer_stride = n,
               .inner_stride = 1,
               .stride = 1,
               .out = bits.data()},
              kSerial);
}

// Weights of several shapes in one call: `chosen` grids, or given ones, codes, and gradients.
void many_weights(bool chosen, Touches touches, Rng& rng) {
  struct Weight {
    int64_t rows, inner;
    Guarded<float> x, y, grad, out, scale;
    Guarded<int32_t> zero_point;
    Guarded<int8_t> q;
    Guarded<uint8_t> flags;

    Weight(int64_t rows, int64_t inner, Touches t)
        : rows(rows),
          inner(inner),
          x(rows * inner, t),
          y(rows * inner, t),
          grad(rows * inner, t),
          out(rows * inner, t),
          scale(rows, t),
          zero_point(rows, t),
          q(rows * inner, t),
          flags(rows, t) {}
  };
  std::vector<std::unique_ptr<Weight>> weights[2];
  const uint64_t start = rng.bits();
  for (int k : {0, 1}) {
    Rng same_data(start);
    for (int64_t inner : {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 9001}) {
      auto w = std::make_unique<Weight>(same_data.integer(1, 5), inner, touches);
      same_data.fill(w->x);
      same_data.fill(w->grad);
      for (float& s : w->scale) s = same_data.real(0.05f, 0.5f);
      for (int32_t& z : w->zero_point) z = static_cast<int32_t>(same_data.integer(kQmin, kQmax));
      weights[k].push_back(std::move(w));
    }
  }
  const Isa isa = isa_cap();
  for (int threads_used : {1, 2, 3, 8}) {
    CONTEXT("many weights chosen=", chosen, " threads=", threads_used);
    for (int k : {0, 1}) {
      if (k == 0) set_isa_cap(Isa::kScalar);
      std::vector<ForeachQuantItem> items;
      std::vector<ForeachBackwardItem> gradients;
      for (auto& w : weights[k]) {
        const ForeachItem in{w->x.data(), FloatType::kFloat32, w->rows,
                             w->inner,    w->scale.data(),     w->zero_point.data()};
        items.push_back({in, w->y.data(), w->q.data(), chosen ? w->flags.data() : nullptr});
        gradients.push_back({in, w->grad.data(), w->out.data()});
      }
      const auto count = static_cast<int64_t>(items.size());
      const Parallel parallel = k == 0 ? kSerial : threads(threads_used);
      foreach_fake_quant(
          {.items = items.data(),
           .count = count,
           .rule = {.qmin = kQmin, .qmax = kQmax, .symmetric = false, .min_scale = 1e-6f},
           .q_signed = true},
          parallel);
      foreach_fake_quant_backward({gradients.data(), count, kQmin, kQmax}, parallel);
      set_isa_cap(isa);
    }
    for (size_t i = 0; i < weights[0].size(); ++i) {
      const Weight &a = *weights[0][i], &b = *weights[1][i];
      CHECK(same_bytes(a.y.data(), b.y.data(), a.y.size()), "inner ", a.inner);
      CHECK(same_bytes(a.q.data(), b.q.data(), a.q.size()), "inner ", a.inner);
      CHECK(same_bytes(a.out.data(), b.out.data(), a.out.size()), "inner ", a.inner);
      CHECK(same_bytes(a.scale.data(), b.scale.data(), a.rows), "inner ", a.inner);
      CHECK(same_bytes(a.zero_point.data(), b.zero_point.data(), a.rows), "inner ", a.inner);
      CHECK(same_bytes(a.flags.data(), b.flags.data(), a.rows), "inner ", a.inner);
    }
  }
}

}  // namespace

int main() {
  for_each_isa([](Isa) {
    Rng rng;
    a_nan_in_any_part_is_found();
    for (Touches touches : {Touches::kEnd, Touches::kStart}) {
      for (FloatType type : {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16}) {
        for (int64_t n = 0; n <= 140; ++n) {
          extremes_equal_scalar(type, n, touches, rng);
          mask_equals_scalar(type, n, touches, rng);
          dorefa_equals_scalar(type, n, touches, rng);
          signs_and_bits_stay_inside(type, n, touches, rng);
        }
      }
      for (int64_t words : {1, 2, 5}) {
        for (int64_t count : {0, 1, 3, 9}) sign_products_equal_scalar(words, count, touches, rng);
      }
      for (bool chosen : {false, true}) many_weights(chosen, touches, rng);
    }
  });
}
