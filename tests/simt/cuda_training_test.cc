// The kernels of training on the emulator: the bits of the CPU's, the sums of learned grids and the
// state of observers too, for any order of blocks.
#include <memory>
#include <vector>

#include "csrc/fake_quant_backward/backward.h"
#include "csrc/fake_quant_backward/cuda.cu"
#include "csrc/fake_quant_mask/cuda.cu"
#include "csrc/foreach/cuda.cu"
#include "csrc/foreach/foreach.h"
#include "csrc/observe/cuda.cu"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"
#include "tests/simt/grids.h"

using namespace qk;
using namespace qk::test;

namespace {

const Shape kShapes[] = {
    {1, 1, 1},  {1, 1, 4096}, {1, 1, 12 * 4096 + 77}, {2, 3, 5},   {1, 4, 5000},
    {3, 5, 64}, {3, 16, 1},   {700, 24, 1},           {9, 600, 1}, {0, 3, 4}};

template <typename T>
void lsq_gives_the_bits_of_the_cpu(const Shape& shape, FloatType type, int64_t misalign, bool clips,
                                   bool strange) {
  CONTEXT("shape ", shape, " type ", type, " misalign ", misalign, " clips ", clips);
  Rng rng(static_cast<uint64_t>(shape.size() + misalign));
  const int64_t size = shape.size();
  const Grids grids(shape, rng, -7, 8);
  Guarded<T> x(size + misalign, Touches::kStart), grad(size + misalign, Touches::kStart);
  Guarded<T> out(size + misalign, Touches::kStart), expected(size);
  for (T& v : x) from_float(rng.real(-1, 1), &v);
  for (T& v : grad) from_float(rng.real(-1, 1), &v);
  if (strange) fill_floats(x, rng);
  Guarded<float> scale_grad(shape.channels), zero_grad(shape.channels);
  Guarded<float> scale_expected(shape.channels), zero_expected(shape.channels);
  const GridLayout walk = grids.strided();
  Guarded<double> cpu_workspace(lsq_workspace(walk));
  lsq_backward(
      {grad.data() + misalign, x.data() + misalign, expected.data(), type, -7, 8, walk, clips},
      {shape.channels, 0.25, cpu_workspace.data(), scale_expected.data(), zero_expected.data()},
      kSerial);
  Guarded<double> workspace(lsq_cuda_workspace(grids.dense()), Touches::kStart);
  simt::seed = rng.bits();
  CHECK_EQ(lsq_backward_cuda(
               {grad.data() + misalign, x.data() + misalign, out.data() + misalign, type, -7, 8,
                clips, grids.dense(), 0.25, workspace.data(), scale_grad.data(), zero_grad.data()},
               nullptr),
           cudaSuccess);
  CHECK(same_bytes(out.data() + misalign, expected.data(), size));
  CHECK(same_bytes(scale_grad.data(), scale_expected.data(), shape.channels));
  CHECK(same_bytes(zero_grad.data(), zero_expected.data(), shape.channels));
}

template <typename T>
void masks_give_the_bits_of_the_cpu(const Shape& shape, FloatType type, int64_t misalign) {
  CONTEXT("shape ", shape, " type ", type, " misalign ", misalign);
  Rng rng(static_cast<uint64_t>(shape.size() + misalign));
  const int64_t size = shape.size();
  const Grids grids(shape, rng, -7, 8);
  const GridLayout walk = grids.strided();
  const MaskLayout layout = mask_layout(walk);
  Guarded<T> x(size + misalign, Touches::kStart), y(size + misalign, Touches::kStart);
  Guarded<T> y_expected(size);
  Guarded<uint8_t> mask(layout.bytes, Touches::kStart), mask_expected(layout.bytes);
  Guarded<uint8_t> codes(size, Touches::kStart), codes_expected(size);
  const bool with_codes = misalign != 1;
  const bool wild = rng.chance(0.7);
  for (T& v : x) from_float(rng.real(-0.05f, 0.05f), &v);
  if (wild) fill_floats(x, rng);
  // Without channels perhaps behind a clamp, whose codes the device finds by itself.
  const float infinity = std::numeric_limits<float>::infinity();
  float floor = -infinity, ceiling = infinity;
  if (shape.channels == 1) {
    floor = rng.pick({-infinity, -0.1f, 0.0f, 0.02f});
    ceiling = rng.pick({infinity, 0.02f, 0.3f});
  }
  const CodeEnds range =
      clamped_ends(floor, ceiling, 1.0f / walk.scale[0], walk.zero_point[0], -7, 8);
  const bool expected = fake_quant_mask(
      {x.data() + misalign, y_expected.data(), mask_expected.data(),
       with_codes ? codes_expected.data() : nullptr, type, range.qmin, range.qmax, walk},
      kSerial);
  bool clipped = !expected;
  simt::seed = rng.bits();
  CHECK_EQ(fake_quant_mask_cuda({x.data() + misalign, y.data() + misalign, mask.data(),
                                 with_codes ? codes.data() : nullptr, &clipped, type, -7, 8,
                                 grids.dense(), layout, floor, ceiling},
                                nullptr),
           cudaSuccess);
  CHECK(same_bytes(y.data() + misalign, y_expected.data(), size));
  CHECK(same_bytes(mask.data(), mask_expected.data(), layout.bytes));
  CHECK_EQ(clipped, expected);
  if (with_codes) CHECK(same_bytes(codes.data(), codes_expected.data(), size));
  fake_quant_mask_backward({x.data() + misalign, mask.data(), y_expected.data(), type, walk},
                           kSerial);
  CHECK_EQ(
      mask_backward_cuda(
          {x.data() + misalign, mask.data(), y.data() + misalign, type, size, layout}, nullptr),
      cudaSuccess);
  CHECK(same_bytes(y.data() + misalign, y_expected.data(), size));
}

// State and grid after a few batches, one of them with strange values.
template <typename T>
void observers_give_the_bits_of_the_cpu(const Shape& shape, FloatType type, bool ignore,
                                        bool averages) {
  CONTEXT("shape ", shape, " type ", type, " ignore ", ignore, " averages ", averages);
  if (shape.size() == 0) return;
  Rng rng(static_cast<uint64_t>(shape.size()));
  const float inf = std::numeric_limits<float>::infinity();
  const int64_t size = shape.size(), n = shape.channels;
  struct State {
    Guarded<float> low, high, scale;
    Guarded<int32_t> zero_point;
    explicit State(int64_t n) : low(n), high(n), scale(n), zero_point(n) {}
    ObserverState view() { return {low.data(), high.data(), scale.data(), zero_point.data()}; }
  } cpu(n), gpu(n), next(n);
  for (State* s : {&cpu, &gpu}) {
    for (float& v : s->low) v = inf;
    for (float& v : s->high) v = -inf;
    for (float& v : s->scale) v = 1;
    for (int32_t& v : s->zero_point) v = 0;
  }
  const Grids grids(shape, rng);
  const GridLayout walk = grids.strided();
  const ObserverRule rule{
      {-128, 127, rng.chance(0.5), 1e-6f}, averages, 0.1f, rng.chance(0.5) ? -inf : -2.0f, inf};
  int64_t counts[2] = {}, expected_counts[2] = {};
  Guarded<T> x(size, Touches::kStart);
  for (int batch = 0; batch < 4; ++batch) {
    for (T& v : x) from_float(rng.real(-4, 4), &v);
    if (batch == 2) fill_floats(x, rng);
    Guarded<float> cpu_workspace(observe_workspace(walk, n));
    ObserveArgs args{.x = x.data(),
                     .y = nullptr,
                     .type = type,
                     .grid = walk,
                     .channels = n,
                     .rule = rule.rule,
                     .averages = rule.averages,
                     .momentum = rule.momentum,
                     .ignore_non_finite = ignore,
                     .floor = rule.floor,
                     .ceiling = rule.ceiling,
                     .state = cpu.view(),
                     .next = next.view(),
                     .workspace = cpu_workspace.data()};
    const Observed observed = observe(args, kSerial);
    expected_counts[0] += observed.non_finite.nans;
    expected_counts[1] += observed.non_finite.infinities;
    Guarded<uint8_t> workspace(observe_cuda_workspace(grids.dense()), Touches::kStart);
    bool clipped = !observed.clipped;
    simt::seed = rng.bits();
    CHECK_EQ(observe_cuda({x.data(), type, grids.dense(), rule, gpu.view(),
                           ignore ? counts : nullptr, &clipped, workspace.data()},
                          nullptr),
             cudaSuccess);
    CHECK(same_bytes(gpu.low.data(), cpu.low.data(), n));
    CHECK(same_bytes(gpu.high.data(), cpu.high.data(), n));
    CHECK(same_bytes(gpu.scale.data(), cpu.scale.data(), n));
    CHECK(same_bytes(gpu.zero_point.data(), cpu.zero_point.data(), n));
    CHECK_EQ(clipped, observed.clipped);
    if (ignore) {
      CHECK_EQ(counts[0], expected_counts[0]);
      CHECK_EQ(counts[1], expected_counts[1]);
    }
  }
}

// More chunks of rows than the second dimension of a grid has blocks.
// Not from the start again: none would look like no fault.
void strange_values_are_counted_as_far_as_numbers_go() {
  cuda::Extremes half, other;
  half.nans = half.infinities = 1u << 31;
  other.infinities = 5;
  other.join(half);
  CHECK_EQ(other.infinities, (1u << 31) + 5);
  half.join(other);
  CHECK_EQ(half.nans, ~0u);
  CHECK_EQ(half.infinities, ~0u);
}

void millions_of_rows_are_observed() {
  const int64_t rows = 65536 * kColumnRows;
  std::vector<BFloat16> x(static_cast<size_t>(2 * rows));
  from_float(-3.0f, &x.front());
  from_float(5.0f, &x.back());
  const DenseGrid grid{nullptr, nullptr, 2 * rows, 2, 1};
  std::vector<uint8_t> workspace(static_cast<size_t>(minmax_cuda_workspace(grid)));
  float low[2], high[2];
  int64_t non_finite[2];
  CHECK_EQ(minmax_cuda({.x = x.data(),
                        .type = FloatType::kBFloat16,
                        .grid = grid,
                        .low = low,
                        .high = high,
                        .non_finite = non_finite,
                        .workspace = workspace.data()},
                       nullptr),
           cudaSuccess);
  CHECK_EQ(low[0], -3.0f);
  CHECK_EQ(high[1], 5.0f);
  CHECK_EQ(low[1], 0.0f);
}

template <typename T>
void lists_give_the_bits_of_the_cpu(FloatType type) {
  Rng rng(4);
  struct Weight {
    int64_t rows, inner;
    Guarded<T> x, y, y_expected, grad, out, out_expected;
    Guarded<uint8_t> q, q_expected, flags, flags_expected;
    Guarded<float> scale, scale_expected;
    Guarded<int32_t> zero_point, zero_point_expected;
    Weight(int64_t rows, int64_t inner)
        : rows(rows),
          inner(inner),
          x(rows * inner, Touches::kStart),
          y(rows * inner, Touches::kStart),
          y_expected(rows * inner),
          grad(rows * inner),
          out(rows * inner),
          out_expected(rows * inner),
          q(rows * inner),
          q_expected(rows * inner),
          flags(rows),
          flags_expected(rows),
          scale(rows),
          scale_expected(rows),
          zero_point(rows),
          zero_point_expected(rows) {}
  };
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<ForeachQuantItem> cpu, gpu;
  std::vector<ForeachBackwardItem> cpu_back, gpu_back;
  for (int i = 0; i < 60; ++i) {
    int64_t rows = rng.integer(0, 5), inner = rng.pick<int64_t>({0, 1, 3, 16, 27, 64, 700});
    if (i % 20 == 7) rows = i / 20 + 1, inner = 2 * 32768 + rng.integer(-3, 90);  // several blocks
    weights.push_back(std::make_unique<Weight>(rows, inner));
    Weight& w = *weights.back();
    for (T& v : w.x) from_float(rng.real(-1, 1), &v);
    for (T& v : w.grad) from_float(rng.real(-1, 1), &v);
    cpu.push_back(
        {{w.x.data(), type, rows, inner, w.scale_expected.data(), w.zero_point_expected.data()},
         w.y_expected.data(),
         w.q_expected.data(),
         w.flags_expected.data()});
    gpu.push_back({{w.x.data(), type, rows, inner, w.scale.data(), w.zero_point.data()},
                   w.y.data(),
                   w.q.data(),
                   w.flags.data()});
    cpu_back.push_back({cpu.back().in, w.grad.data(), w.out_expected.data()});
    gpu_back.push_back({gpu.back().in, w.grad.data(), w.out.data()});
  }
  const auto count = static_cast<int64_t>(weights.size());
  const GridRule rule{-128, 127, false, 1e-6f};
  Guarded<bool> clipped(count);
  simt::seed = rng.bits();
  foreach_fake_quant({cpu.data(), count, rule, true}, kSerial);
  const ForeachQuantArgs on_gpu{gpu.data(), count, rule, true};
  Guarded<uint8_t> workspace(foreach_cuda_workspace(on_gpu), Touches::kStart);
  CHECK(workspace.size() > 0);
  CHECK_EQ(foreach_fake_quant_cuda(on_gpu, clipped.data(), workspace.data(), nullptr), cudaSuccess);
  foreach_fake_quant_backward({cpu_back.data(), count, -20, 20}, kSerial);
  CHECK_EQ(foreach_fake_quant_backward_cuda({gpu_back.data(), count, -20, 20}, nullptr),
           cudaSuccess);
  for (int64_t i = 0; i < count; ++i) {
    bool expected = false;
    for (const uint8_t flag : weights[static_cast<size_t>(i)]->flags_expected) {
      expected |= flag != kRowFine;
    }
    CHECK_EQ(clipped[i], expected, "of item ", i);
  }
  for (const auto& w : weights) {
    CONTEXT("rows ", w->rows, " inner ", w->inner);
    const int64_t size = w->rows * w->inner;
    CHECK(same_bytes(w->scale.data(), w->scale_expected.data(), w->rows));
    CHECK(same_bytes(w->zero_point.data(), w->zero_point_expected.data(), w->rows));
    CHECK(same_bytes(w->flags.data(), w->flags_expected.data(), w->rows));
    CHECK(same_bytes(w->y.data(), w->y_expected.data(), size));
    CHECK(same_bytes(w->q.data(), w->q_expected.data(), size));
    CHECK(same_bytes(w->out.data(), w->out_expected.data(), size));
  }
}

// Wherever in a row of several blocks it is.
void a_row_that_is_not_finite_becomes_nan() {
  constexpr int64_t kSize = 100000;
  for (const int64_t where : {int64_t{5}, kSize - 1}) {
    Guarded<float> x(kSize), y(kSize), scale(1);
    Guarded<int32_t> zero_point(1);
    Guarded<uint8_t> flags(1);
    Guarded<bool> clipped(1);
    for (float& v : x) v = 1.0f;
    x[where] = std::numeric_limits<float>::infinity();
    const ForeachQuantItem item{
        {x.data(), FloatType::kFloat32, 1, kSize, scale.data(), zero_point.data()},
        y.data(),
        nullptr,
        flags.data()};
    const ForeachQuantArgs args{&item, 1, GridRule{-128, 127, false, 1e-6f}, true};
    Guarded<uint8_t> workspace(foreach_cuda_workspace(args), Touches::kStart);
    CHECK_EQ(foreach_fake_quant_cuda(args, clipped.data(), workspace.data(), nullptr), cudaSuccess);
    CHECK_EQ(flags[0], kRowNotFinite);
    CHECK(clipped[0]);
    CHECK(scale[0] != scale[0]);
    for (const float v : y) CHECK(v != v);
  }
}

void zero_points_are_rounded_as_on_the_cpu() {
  Rng rng(2);
  Guarded<float> learned(37);
  Guarded<int32_t> got(37), expected(37);
  for (float& v : learned) v = rng.pick({0.5f, 1.5f, -2.5f, 300.0f, -300.0f, rng.real(-9, 9)});
  round_zero_points(learned.data(), expected.data(), 37, -8, 7);
  CHECK_EQ(round_zero_points_cuda(learned.data(), got.data(), 37, -8, 7, nullptr), cudaSuccess);
  CHECK(same_bytes(got.data(), expected.data(), 37));
}

// x and the gradient are read once, what goes back is written once: 12 bytes an element, and a few
// sums.
void gradients_move_as_few_bytes_as_there_are() {
  constexpr int64_t kSize = 16 * 4096;
  Rng rng(4);
  const Shape shape{1, 1, kSize};
  const Grids grids(shape, rng, -7, 8);
  Guarded<float> x(kSize), grad(kSize), out(kSize), sums(2);
  Guarded<double> workspace(lsq_cuda_workspace(grids.dense()));
  simt::counters = {};
  CHECK_EQ(lsq_backward_cuda({grad.data(), x.data(), out.data(), FloatType::kFloat32, -7, 8, false,
                              grids.dense(), 1.0, workspace.data(), sums.data(), sums.data() + 1},
                             nullptr),
           cudaSuccess);
  CHECK_EQ(simt::counters.vector_loads, uint64_t{2} * kSize / 4);
  CHECK_EQ(simt::counters.vector_stores, uint64_t{kSize} / 4);
  CHECK(workspace.size() * 8 < kSize / 64, "of workspace");
}

void a_missing_barrier_is_noticed() {
  Rng rng(3);
  const Shape shape{1, 1, 4096};
  const Grids grids(shape, rng, -7, 8);
  Guarded<float> x(4096), grad(4096), out(4096), sums(2);
  Guarded<double> workspace(lsq_cuda_workspace(grids.dense()));
  expect_fault("shared byte", [&] {
    simt::sabotage.skip_barrier = 0;
    lsq_backward_cuda({grad.data(), x.data(), out.data(), FloatType::kFloat32, -7, 8, false,
                       grids.dense(), 1.0, workspace.data(), sums.data(), sums.data() + 1},
                      nullptr);
  });
}

}  // namespace

int main() {
  for (const Shape& shape : kShapes) {
    for (const int64_t misalign : {0, 3}) {
      lsq_gives_the_bits_of_the_cpu<float>(shape, FloatType::kFloat32, misalign, misalign > 0,
                                           false);
      lsq_gives_the_bits_of_the_cpu<BFloat16>(shape, FloatType::kBFloat16, misalign, false,
                                              misalign > 0);
      lsq_gives_the_bits_of_the_cpu<Float16>(shape, FloatType::kFloat16, misalign, false, false);
    }
  }
  for (const Shape& shape : kShapes) {
    masks_give_the_bits_of_the_cpu<float>(shape, FloatType::kFloat32, 0);
    masks_give_the_bits_of_the_cpu<float>(shape, FloatType::kFloat32, 1);
    masks_give_the_bits_of_the_cpu<BFloat16>(shape, FloatType::kBFloat16, 0);
    masks_give_the_bits_of_the_cpu<Float16>(shape, FloatType::kFloat16, 3);
    for (const bool averages : {false, true}) {
      observers_give_the_bits_of_the_cpu<float>(shape, FloatType::kFloat32, !averages, averages);
      observers_give_the_bits_of_the_cpu<BFloat16>(shape, FloatType::kBFloat16, averages, averages);
      observers_give_the_bits_of_the_cpu<Float16>(shape, FloatType::kFloat16, averages, !averages);
    }
  }
  strange_values_are_counted_as_far_as_numbers_go();
  millions_of_rows_are_observed();
  lists_give_the_bits_of_the_cpu<float>(FloatType::kFloat32);
  lists_give_the_bits_of_the_cpu<BFloat16>(FloatType::kBFloat16);
  lists_give_the_bits_of_the_cpu<Float16>(FloatType::kFloat16);
  a_row_that_is_not_finite_becomes_nan();
  zero_points_are_rounded_as_on_the_cpu();
  gradients_move_as_few_bytes_as_there_are();
  a_missing_barrier_is_noticed();
}
