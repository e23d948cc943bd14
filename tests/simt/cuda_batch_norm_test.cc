// Batch normalization with the grid behind it on the emulator: the bits of the CPU's kernels, the
// statistics and all sums too, for any order of blocks.
#include <vector>

#include "csrc/base/tree_sum.h"
#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/cuda.cu"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"

using namespace qk;
using namespace qk::test;

namespace {

constexpr int32_t kQmin = -40, kQmax = 50;
const float kInfinite = std::numeric_limits<float>::infinity();

enum class Cancels { kNothing, kX, kGrad };

struct Case {
  int64_t rows, channels;
  int64_t misalign;  // elements
  bool strange;      // some of x is not finite
  Cancels cancels = Cancels::kNothing;
};
std::ostream& operator<<(std::ostream& to, const Case& c) {
  return to << c.rows << "x" << c.channels << " misalign " << c.misalign << " strange " << c.strange
            << " cancels " << static_cast<int>(c.cancels);
}

// Behind `misalign` elements that nobody touches.
template <typename T>
struct Buffer : Guarded<T> {
  int64_t misalign;
  explicit Buffer(int64_t size, int64_t misalign = 0)
      : Guarded<T>(size + misalign, Touches::kStart), misalign(misalign) {}
  T* at() { return this->data() + misalign; }
  int64_t count() const { return this->size() - misalign; }
};

struct Reals : Buffer<float> {
  Reals(int64_t size, float low, float high, Rng& rng, int64_t misalign = 0)
      : Buffer(size, misalign) {
    for (float& v : *this) v = rng.real(low, high);
  }
};

// Sums of doubles seldom show their order in a float, unless most of them cancels: here it does,
// between columns of a channel and between tasks. 0: an element that does not.
float cancelling(const NormWalk& walk, int64_t row) {
  constexpr float kSize = 0x1p40f;
  const int64_t column = row % walk.fold, task_rows = walk.fold * walk.chunk;
  if (column == 1) return kSize;
  if (column == 2) return -kSize;
  if (row % task_rows != 0) return 0;
  return row / task_rows % 4 == 1 ? kSize : row / task_rows % 4 == 2 ? -kSize : 0;
}
template <typename F>
void cancel(const Case& c, const F& f) {
  const NormWalk walk(c.rows, c.channels);
  for (int64_t row = 0; row < c.rows; ++row) {
    const float size = cancelling(walk, row);
    for (int64_t i = 0; i < c.channels && size != 0; ++i) f(row * c.channels + i, size);
  }
}

template <typename T>
bool same(Buffer<T>& a, Buffer<T>& b) {
  return same_bytes(a.at(), b.at(), a.count());
}

// A NaN of an element is a NaN, whatever its payload.
bool same_or_nan(Buffer<float>& a, Buffer<float>& b) {
  for (int64_t i = 0; i < a.count(); ++i) {
    const float u = a.at()[i], v = b.at()[i];
    if (u == u ? float_bits(u) != float_bits(v) : v == v) return false;
  }
  return true;
}

// What the statistics give, by channel.
struct Found {
  Buffer<float> mean, inv_std, factor, shift, running_mean, running_var;
  Extremes extremes;

  Found(int64_t channels, Rng rng)
      : mean(channels),
        inv_std(channels),
        factor(channels),
        shift(channels),
        running_mean(channels),
        running_var(channels) {
    for (float& v : running_mean) v = rng.real(-1, 1);
    for (float& v : running_var) v = rng.real(0, 2);
  }
  BatchStatisticsArgs args(const Case& c, Buffer<float>& x, const float* weight, const float* bias,
                           double* workspace) {
    return {.x = x.at(),
            .rows = c.rows,
            .channels = c.channels,
            .weight = weight,
            .bias = bias,
            .running_mean = running_mean.at(),
            .running_var = running_var.at(),
            .momentum = 0.1,
            .eps = 1e-5,
            .mean = mean.at(),
            .inv_std = inv_std.at(),
            .factor = factor.at(),
            .shift = shift.at(),
            .workspace = workspace};
  }
};

void statistics_give_the_bits_of_the_cpu(const Case& c, Buffer<float>& x, Found& cpu, Rng& rng) {
  const bool weighted = rng.chance(0.7), biased = rng.chance(0.7);
  Reals weight(c.channels, -2, 2, rng), bias(c.channels, -1, 1, rng);
  if (c.strange && rng.chance(0.5)) weight[0] = std::nanf("0x123");
  const float* weights = weighted ? weight.at() : nullptr;
  const float* biases = biased ? bias.at() : nullptr;
  Found gpu(c.channels, Rng(7));
  Guarded<double> cpu_workspace(batch_statistics_workspace(c.rows, c.channels));
  cpu.extremes = batch_statistics(cpu.args(c, x, weights, biases, cpu_workspace.data()), kSerial);
  Guarded<double> workspace(batch_statistics_cuda_workspace(c.rows, c.channels), Touches::kStart);
  Guarded<float> extremes(2);
  simt::seed = rng.bits();
  CHECK_EQ(batch_statistics_cuda(gpu.args(c, x, weights, biases, workspace.data()), extremes.data(),
                                 nullptr),
           cudaSuccess);
  CHECK(same(gpu.mean, cpu.mean));
  CHECK(same(gpu.inv_std, cpu.inv_std));
  CHECK(same(gpu.factor, cpu.factor));
  CHECK(same(gpu.shift, cpu.shift));
  CHECK(same(gpu.running_mean, cpu.running_mean));
  CHECK(same(gpu.running_var, cpu.running_var));
  CHECK(same_bytes(extremes.data(), &cpu.extremes.low, 1));
  CHECK(same_bytes(extremes.data() + 1, &cpu.extremes.high, 1));
}

// One grid, as the CPU takes it and as it lies on the device.
struct Grid {
  Guarded<float> scale{1}, learned{1};
  Guarded<int32_t> zero_point{1};
  NormGrid cpu;
  NormCudaGrid cuda;

  explicit Grid(Rng& rng) {
    const bool rounds = rng.chance(0.5);
    scale[0] = rng.pick({0.05f, 0.0117f, 0.3f});
    learned[0] = rng.pick({2.5f, -3.5f, 0.2f, 1000.0f});
    zero_point[0] = rng.pick({3, kQmin, kQmax});
    const float floor = rng.pick({-kInfinite, 0.0f, -0.5f});
    const float ceiling = rng.pick({kInfinite, 6.0f, 0.0f, 1.5f});
    cpu = {.scale = scale[0],
           .zero_point = rounds ? round_zero_point(learned[0], kQmin, kQmax) : zero_point[0],
           .qmin = kQmin,
           .qmax = kQmax,
           .floor = floor,
           .ceiling = ceiling};
    cuda = {.scale = scale.data(),
            .zero_point = rounds ? nullptr : zero_point.data(),
            .learned_zero_point = rounds ? learned.data() : nullptr,
            .qmin = kQmin,
            .qmax = kQmax,
            .floor = floor,
            .ceiling = ceiling};
  }
};

void forward_gives_the_bits_of_the_cpu(const Case& c, Buffer<float>& x, Found& found, Rng& rng) {
  const int64_t size = c.rows * c.channels;
  const Grid grid(rng);
  const bool coded = rng.chance(0.6);
  Buffer<float> y(size, c.misalign), expected(size, c.misalign);
  Buffer<uint8_t> codes(size, c.misalign), expected_codes(size, c.misalign);
  norm_fake_quant({x.at(), expected.at(), coded ? expected_codes.at() : nullptr, c.rows, c.channels,
                   found.factor.at(), found.shift.at(), grid.cpu},
                  kSerial);
  simt::seed = rng.bits();
  CHECK_EQ(norm_fake_quant_cuda({x.at(), y.at(), coded ? codes.at() : nullptr, c.rows, c.channels,
                                 found.factor.at(), found.shift.at(), grid.cuda},
                                nullptr),
           cudaSuccess);
  CHECK(same(y, expected));
  CHECK(same(codes, expected_codes));
}

void backward_gives_the_bits_of_the_cpu(const Case& c, Buffer<float>& x, Found& found, bool learned,
                                        bool in_place, Rng& rng) {
  const int64_t size = c.rows * c.channels;
  const Grid grid(rng);
  Reals grad(size, -1, 1, rng, c.misalign);
  if (c.cancels == Cancels::kGrad) {
    cancel(c, [&](int64_t i, float size) { grad.at()[i] = size; });
  }
  Buffer<float> out(size, c.misalign), expected(size, c.misalign);
  struct Gradients {
    Buffer<float> weight, bias, scale{1}, zero_point{1};
    explicit Gradients(int64_t channels) : weight(channels), bias(channels) {}
  } cpu(c.channels), gpu(c.channels);
  Guarded<double> cpu_workspace(norm_backward_workspace(c.rows, c.channels));
  norm_backward({.grad = grad.at(),
                 .x = x.at(),
                 .out = expected.at(),
                 .rows = c.rows,
                 .channels = c.channels,
                 .mean = found.mean.at(),
                 .inv_std = found.inv_std.at(),
                 .factor = found.factor.at(),
                 .shift = found.shift.at(),
                 .grid = grid.cpu,
                 .learned = learned,
                 .grad_factor = 0.25,
                 .weight = cpu.weight.at(),
                 .bias = cpu.bias.at(),
                 .scale = cpu.scale.at(),
                 .zero_point = cpu.zero_point.at(),
                 .workspace = cpu_workspace.data()},
                kSerial);
  Guarded<double> workspace(norm_backward_cuda_workspace(c.rows, c.channels), Touches::kStart);
  simt::seed = rng.bits();
  CHECK_EQ(norm_backward_cuda({.grad = grad.at(),
                               .x = x.at(),
                               .out = in_place ? grad.at() : out.at(),
                               .rows = c.rows,
                               .channels = c.channels,
                               .mean = found.mean.at(),
                               .inv_std = found.inv_std.at(),
                               .factor = found.factor.at(),
                               .shift = found.shift.at(),
                               .grid = grid.cuda,
                               .learned = learned,
                               .grad_factor = 0.25,
                               .weight = gpu.weight.at(),
                               .bias = gpu.bias.at(),
                               .scale = gpu.scale.at(),
                               .zero_point = gpu.zero_point.at(),
                               .workspace = workspace.data()},
                              nullptr),
           cudaSuccess);
  CHECK(same(gpu.weight, cpu.weight));
  CHECK(same(gpu.bias, cpu.bias));
  CHECK(same(gpu.scale, cpu.scale));
  CHECK(same(gpu.zero_point, cpu.zero_point));
  CHECK(same_or_nan(in_place ? grad : out, expected));
}

void training_gives_the_bits_of_the_cpu(const Case& c, Rng& rng) {
  CONTEXT(c);
  Reals x(c.rows * c.channels, -2, 3, rng, c.misalign);
  if (c.cancels == Cancels::kX) cancel(c, [&](int64_t i, float size) { x.at()[i] = size; });
  if (c.cancels == Cancels::kGrad) cancel(c, [&](int64_t i, float) { x.at()[i] = 0.25f; });
  if (c.strange) {
    for (int i = 0; i < 3; ++i) {
      x.at()[rng.integer(0, x.count() - 1)] =
          rng.pick({kInfinite, -kInfinite, std::nanf(""), -0.0f, 1e30f});
    }
  }
  Found found(c.channels, Rng(7));
  statistics_give_the_bits_of_the_cpu(c, x, found, rng);
  forward_gives_the_bits_of_the_cpu(c, x, found, rng);
  for (const bool learned : {false, true}) {
    backward_gives_the_bits_of_the_cpu(c, x, found, learned, rng.chance(0.3), rng);
  }
}

// Channels whose ends are zeros of either sign.
void the_extremes_of_a_constant_are_the_cpus() {
  for (const int64_t channels : {1, 3, 40}) {
    const Case c{6, channels, 0, false};
    Buffer<float> x(c.rows * channels);
    Rng rng(5);
    for (int64_t i = 0; i < x.count(); ++i) x[i] = i % channels % 2 == 0 ? -0.0f : 0.0f;
    Found found(channels, Rng(7));
    statistics_give_the_bits_of_the_cpu(c, x, found, rng);
    CHECK(!std::signbit(found.extremes.low) || found.extremes.low < 0);
  }
}

// However many values: the same tree, from the smallest levels to those that lanes keep.
void trees_are_those_of_the_cpu() {
  Rng rng(6);
  std::vector<double> values(3 * 9000);
  for (double& v : values) v = static_cast<double>(rng.real(-1, 1)) / 3;
  std::vector<uint32_t> counts{300, 512, 1000, 1023, 4133, 8999};
  for (uint32_t n = 1; n <= 140; ++n) counts.push_back(n);
  for (const uint32_t count : counts) {
    CONTEXT("count ", count);
    simt::seed = rng.bits();
    double got[3] = {};
    simt::launch(1, cuda::kWarpSize, 0, [&] {
      double total[3];
      tree_sums<3>([&](int which, uint32_t i) { return values[which * 9000u + i]; }, count, total);
      if (threadIdx.x != 9) return;
      for (int s = 0; s < 3; ++s) got[s] = total[s];
    });
    for (int s = 0; s < 3; ++s) {
      TreeSum expected;
      for (uint32_t i = 0; i < count; ++i) expected.add(values[static_cast<size_t>(s) * 9000 + i]);
      CHECK_EQ(got[s], expected.total(), "of sum ", s);
    }
  }
}

// Each tensor is read or written once, 16 bytes at a time, where no row of channels is whole
// vectors either.
void passes_that_write_move_16_bytes_at_a_time() {
  for (const int64_t channels : {1, 30, 33, 64}) {
    CONTEXT("channels ", channels);
    const int64_t rows = 4 * 128 * 3, size = rows * channels;
    Rng rng(8);
    Reals x(size, -2, 3, rng), grad(size, -1, 1, rng), of_channel(channels, 0.5, 1, rng);
    Buffer<float> y(size), sums(channels), of_grid(2);
    Buffer<uint8_t> codes(size);
    const Grid grid(rng);
    const float* c = of_channel.at();
    const auto vectors = static_cast<uint64_t>(size / 4);
    const auto least = [&](uint64_t tensors) { return vectors * tensors * 95 / 100; };
    simt::counters = {};
    CHECK_EQ(norm_fake_quant_cuda({x.at(), y.at(), codes.at(), rows, channels, c, c, grid.cuda},
                                  nullptr),
             cudaSuccess);
    CHECK(simt::counters.vector_loads >= least(1));
    CHECK(simt::counters.vector_loads <=
          vectors + vectors / 2);  // two for the four rows of a thread
    CHECK(simt::counters.vector_stores >= least(1));
    Guarded<double> workspace(norm_backward_cuda_workspace(rows, channels), Touches::kStart);
    simt::counters = {};
    CHECK_EQ(norm_backward_cuda({.grad = grad.at(),
                                 .x = x.at(),
                                 .out = y.at(),
                                 .rows = rows,
                                 .channels = channels,
                                 .mean = c,
                                 .inv_std = c,
                                 .factor = c,
                                 .shift = c,
                                 .grid = grid.cuda,
                                 .learned = true,
                                 .grad_factor = 1,
                                 .weight = sums.at(),
                                 .bias = sums.at(),
                                 .scale = of_grid.at(),
                                 .zero_point = of_grid.at() + 1,
                                 .workspace = workspace.data()},
                                nullptr),
             cudaSuccess);
    CHECK(simt::counters.vector_loads >= least(2));
    CHECK(simt::counters.vector_loads <= 2 * vectors + vectors * 5 / 4);
    CHECK(simt::counters.vector_stores >= least(1));
  }
}

void a_missing_barrier_is_noticed() {
  Rng rng(3);
  const Case c{4000, 24, 0, false};
  Reals x(c.rows * c.channels, -2, 3, rng);
  Found found(c.channels, Rng(7));
  simt::sabotage.skip_barrier = 0;
  expect_fault("shared byte", [&] { statistics_give_the_bits_of_the_cpu(c, x, found, rng); });
  expect_fault("shared byte",
               [&] { backward_gives_the_bits_of_the_cpu(c, x, found, true, false, rng); });
  simt::sabotage.skip_barrier = -1;
}

}  // namespace

int main() {
  Rng rng;
  for (const int64_t channels : {1, 2, 7, 16, 96, 255, 256, 257, 300, 512, 513, 1030}) {
    training_gives_the_bits_of_the_cpu(
        {200000 / channels, channels, 0, false, channels % 2 == 0 ? Cancels::kX : Cancels::kGrad},
        rng);
    if (channels > 513) continue;
    training_gives_the_bits_of_the_cpu({9, channels, 3, true}, rng);
    if (channels > 96) continue;
    training_gives_the_bits_of_the_cpu({2, channels, 0, true}, rng);
    training_gives_the_bits_of_the_cpu({2, channels, 1, false}, rng);
    training_gives_the_bits_of_the_cpu({70, channels, 0, false}, rng);
  }
  for (const int64_t channels : {5, 300}) {  // tasks in more than a warp
    training_gives_the_bits_of_the_cpu(
        {33 * kNormTask / channels + 11, channels, 1, false, Cancels::kGrad}, rng);
  }
  the_extremes_of_a_constant_are_the_cpus();
  trees_are_those_of_the_cpu();
  passes_that_write_move_16_bytes_at_a_time();
  a_missing_barrier_is_noticed();
}
