// Batch normalization with the grid behind it: every kernel equals the scalar one for every number
// of columns on either side of a guard page, and no number of threads changes a bit.
#include "csrc/batch_norm/batch_norm.h"

#include <vector>

#include "tests/csrc/check.h"

using namespace qk;
using namespace qk::test;

namespace {

constexpr NormGrid kGrid{.scale = 0.05f, .zero_point = 3, .qmin = -40, .qmax = 50};
constexpr NormSteps kSteps{.scale = 0.05f,
                           .inv_scale = 1.0f / 0.05f,
                           .lo = -43,
                           .hi = 47,
                           .zero_point = 3,
                           .floor = -0.5f,
                           .ceiling = 2.0f};

struct Reals : Guarded<float> {
  Reals(int64_t n, float low, float high, Touches touches, Rng& rng) : Guarded(n, touches) {
    for (float& v : *this) v = rng.real(low, high);
  }
};

bool same(const Guarded<float>& a, const Guarded<float>& b) {
  return same_bytes(a.data(), b.data(), a.size());
}

void kernels_equal_scalar(int64_t rows, int64_t n, Touches touches, Rng& rng) {
  CONTEXT("rows=", rows, " n=", n);
  const NormKernels scalar = select_norm_kernels(kCpuScalar), kernels = select_norm_kernels();
  const NormRows at{n, rows, n};
  Reals x(rows * n, -3, 3, touches, rng), grad(rows * n, -3, 3, touches, rng);
  Reals factor(n, -2, 2, touches, rng), shift(n, -1, 1, touches, rng), mean(n, -1, 1, touches, rng);
  if (rng.chance(0.3)) x[rng.integer(0, rows * n - 1)] = std::nanf("");

  Guarded<float> totals[2][4] = {{Guarded<float>(n, touches), Guarded<float>(n, touches),
                                  Guarded<float>(n, touches), Guarded<float>(n, touches)},
                                 {Guarded<float>(n, touches), Guarded<float>(n, touches),
                                  Guarded<float>(n, touches), Guarded<float>(n, touches)}};
  bool nan[2];
  for (int k : {0, 1}) {
    for (auto& total : totals[k]) {
      for (float& v : total) v = 0.25f;
    }
    auto& [sum, square, low, high] = totals[k];
    nan[k] = (k == 0 ? scalar : kernels)
                 .statistics({at, x.data(), mean.data(), sum.data(), square.data(), low.data(),
                              high.data()});
  }
  CHECK_EQ(nan[1], nan[0]);
  for (int s = 0; s < 2 && !nan[0]; ++s) CHECK(same(totals[0][s], totals[1][s]));
  for (int s = 2; s < 4; ++s) {
    for (int64_t c = 0; c < n; ++c) CHECK_EQ(totals[1][s][c], totals[0][s][c]);
  }

  Guarded<float> y(rows * n, touches), expected(rows * n, touches);
  Guarded<uint8_t> codes(rows * n, touches), expected_codes(rows * n, touches);
  const bool coded = rng.chance(0.5);
  NormFakeQuantRun forward{at,
                           x.data(),
                           expected.data(),
                           coded ? expected_codes.data() : nullptr,
                           factor.data(),
                           shift.data(),
                           kSteps,
                           false};
  scalar.fake_quant(forward);
  forward.y = y.data();
  if (coded) forward.codes = codes.data();
  forward.stream = rng.chance(0.5);
  kernels.fake_quant(forward);
  stream_fence();
  CHECK(same(y, expected));
  if (coded) CHECK(same_bytes(codes.data(), expected_codes.data(), rows * n));

  for (bool learned : {false, true}) {
    std::vector<float> sums(kNormSums * kGridBlock), expected_sums = sums;
    const int64_t last = kOffset * kGridBlock + n;
    Reals columns(last, -1, 1, touches, rng);
    NormBackwardRun run{at,      grad.data(),    x.data(),
                        nullptr, columns.data(), kSteps,
                        learned, false,          expected_sums.data()};
    if (!learned) {
      run.grid.floor = -std::numeric_limits<float>::infinity();
      run.grid.ceiling = std::numeric_limits<float>::infinity();
    }
    scalar.backward(run);
    run.sums = sums.data();
    kernels.backward(run);
    if (!nan[0])
      CHECK(same_bytes(sums.data(), expected_sums.data(), static_cast<int64_t>(sums.size())));
    run.out = expected.data();
    scalar.backward(run);
    run.out = y.data();
    run.stream = rng.chance(0.5);
    kernels.backward(run);
    stream_fence();
    if (!nan[0]) CHECK(same(y, expected));
  }
}

// Everything that a training step computes, by channel and by element.
struct Results {
  std::vector<float> channels, elements;
  std::vector<uint8_t> codes;
};

Results whole(int64_t rows, int64_t channels, const std::vector<float>& x,
              const std::vector<float>& grad, const Parallel& parallel) {
  Results results{std::vector<float>(8 * channels + 2), std::vector<float>(2 * rows * channels),
                  std::vector<uint8_t>(rows * channels)};
  float* at = results.channels.data();
  float *mean = at, *inv_std = at + channels, *factor = at + 2 * channels,
        *shift = at + 3 * channels;
  float *running = at + 4 * channels, *gradients = at + 6 * channels;
  std::vector<double> workspace(batch_statistics_workspace(rows, channels));
  const Extremes extremes = batch_statistics({.x = x.data(),
                                              .rows = rows,
                                              .channels = channels,
                                              .weight = nullptr,
                                              .bias = nullptr,
                                              .running_mean = running,
                                              .running_var = running + channels,
                                              .momentum = 0.1,
                                              .eps = 1e-5,
                                              .mean = mean,
                                              .inv_std = inv_std,
                                              .factor = factor,
                                              .shift = shift,
                                              .workspace = workspace.data()},
                                             parallel);
  CHECK(extremes.low <= extremes.high);
  float* y = results.elements.data();
  norm_fake_quant({x.data(), y, results.codes.data(), rows, channels, factor, shift, kGrid},
                  parallel);
  workspace.resize(norm_backward_workspace(rows, channels));
  norm_backward({.grad = grad.data(),
                 .x = x.data(),
                 .out = y + rows * channels,
                 .rows = rows,
                 .channels = channels,
                 .mean = mean,
                 .inv_std = inv_std,
                 .factor = factor,
                 .shift = shift,
                 .grid = kGrid,
                 .learned = true,
                 .grad_factor = 0.5,
                 .weight = gradients,
                 .bias = gradients + channels,
                 .scale = gradients + 2 * channels,
                 .zero_point = gradients + 2 * channels + 1,
                 .workspace = workspace.data()},
                parallel);
  return results;
}

void threads_agree(int64_t rows, int64_t channels, Rng& rng) {
  CONTEXT("rows=", rows, " channels=", channels);
  std::vector<float> x(rows * channels), grad(rows * channels);
  for (float& v : x) v = rng.real(-2, 3);
  for (float& v : grad) v = rng.real(-1, 1);
  const Results expected = whole(rows, channels, x, grad, kSerial);
  for (int count : {1, 2, 3, 8}) {
    const Results got = whole(rows, channels, x, grad, qk::test::threads(count));
    CHECK(got.channels == expected.channels);
    CHECK(got.elements == expected.elements);
    CHECK(got.codes == expected.codes);
  }
}

}  // namespace

int main() {
  for_each_isa([](Isa) {
    Rng rng;
    for (Touches touches : {Touches::kEnd, Touches::kStart}) {
      for (int64_t n = 1; n <= 70; ++n) {
        for (int64_t rows : {1, 3, 4, 9}) kernels_equal_scalar(rows, n, touches, rng);
      }
      kernels_equal_scalar(5, kGridBlock, touches, rng);
    }
    for (int64_t channels : {1, 7, 96, 255, 300, 513, 1024}) {
      threads_agree(2, channels, rng);
      threads_agree(300000 / channels, channels, rng);
    }
  });
}
