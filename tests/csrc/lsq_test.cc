// The backward of fake_quant and lsq: every kernel equals the scalar one, sums too, for every
// length on either side of a guard page, and no number of threads changes a bit.
#include <cmath>
#include <limits>
#include <vector>

#include "csrc/fake_quant_backward/backward.h"
#include "tests/csrc/check.h"

using namespace qk;
using namespace qk::test;

namespace {

constexpr int32_t kQmin = -8, kQmax = 7;

struct Grid {
  Guarded<float> scale, inv_scale;
  Guarded<int32_t> zero_point;

  Grid(int64_t channels, Rng& rng) : scale(channels), inv_scale(channels), zero_point(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = rng.real(0.05f, 0.5f);
      inv_scale[c] = 1.0f / scale[c];
      zero_point[c] = static_cast<int32_t>(rng.integer(kQmin, kQmax));
    }
  }
};

void fill_hostile(Guarded<float>& x, Rng& rng) {
  const float inf = std::numeric_limits<float>::infinity(), big = 3e38f;
  for (float& v : x) {
    v = rng.chance(0.1) ? rng.pick({inf, -inf, std::nanf(""), big, -big, -0.0f, 1e-42f})
                        : rng.real(-4, 4);
  }
}

enum class Sums { kNone, kRun, kColumns };

void run_equals_scalar(int64_t n, Touches touches, Sums sums, Rng& rng) {
  CONTEXT("n=", n, " sums=", sums);
  const bool per_element = sums == Sums::kColumns || (sums == Sums::kNone && rng.chance(0.5));
  Grid grid(per_element ? n : 1, rng);
  const int rows = per_element && rng.chance(0.5) ? 2 : 1;
  const int64_t size = rows * n;
  Guarded<float> grad(size, touches), x(size, touches), out(size, touches), expected(size, touches);
  fill_hostile(x, rng);
  rng.fill(grad);
  double partial[2][2] = {};
  std::vector<float> columns[2] = {std::vector<float>(2 * kGridBlock, 0.5f),
                                   std::vector<float>(2 * kGridBlock, 0.5f)};
  FakeQuantBackwardRun run{
      .grad = grad.data(),
      .x = x.data(),
      .out = expected.data(),
      .n = n,
      .grid = {grid.scale.data(), grid.inv_scale.data(), grid.zero_point.data(), per_element},
      .qmin = kQmin,
      .qmax = kQmax,
      .stream = false,
      .clips = sums != Sums::kNone && rng.chance(0.5),
      .partial = sums == Sums::kRun ? partial[0] : nullptr,
      .columns = sums == Sums::kColumns ? columns[0].data() : nullptr,
      .rows = rows,
      .out_step = n,
      .x_step = n};
  fake_quant_backward_f32_scalar(run);
  run.out = out.data();
  run.stream = rng.chance(0.5);
  if (sums == Sums::kRun) run.partial = partial[1];
  if (sums == Sums::kColumns) run.columns = columns[1].data();
  select_fake_quant_backward_kernel(FloatType::kFloat32)(run);
  CHECK(same_bytes(out.data(), expected.data(), size));
  CHECK(same_bytes(partial[0], partial[1], 2));
  CHECK(same_bytes(columns[0].data(), columns[1].data(), 2 * kGridBlock));
}

void threads_do_not_change_bits(int channel_dim, Rng& rng) {
  const int64_t sizes[3] = {37, 5, 9001}, strides[3] = {5 * 9001, 9001, 1};
  const int64_t size = sizes[0] * strides[0], channels = channel_dim < 0 ? 1 : sizes[channel_dim];
  Grid grid(channels, rng);
  Guarded<float> grad(size), x(size), out(size), expected(size);
  rng.fill(grad);
  rng.fill(x);
  StridedLayout<2> walk;
  walk.dims = 3;
  for (int d = 0; d < 3; ++d) {
    walk.size[d] = sizes[d];
    walk.stride[0][d] = walk.stride[1][d] = strides[d];
  }
  FakeQuantBackwardArgs args{
      .grad = grad.data(),
      .x = x.data(),
      .out = expected.data(),
      .type = FloatType::kFloat32,
      .qmin = kQmin,
      .qmax = kQmax,
      .grid = {walk, channel_dim, grid.scale.data(), grid.zero_point.data()}};
  Guarded<double> workspace(lsq_workspace(args.grid));
  Guarded<float> sums[2] = {Guarded<float>(2 * channels), Guarded<float>(2 * channels)};
  for (int count : {1, 2, 3, 8, 500}) {
    CONTEXT("threads=", count, " channel_dim=", channel_dim);
    Guarded<float>& result = sums[count == 1 ? 0 : 1];
    args.out = count == 1 ? expected.data() : out.data();
    lsq_backward(args,
                 {.channels = channels,
                  .factor = 0.5,
                  .workspace = workspace.data(),
                  .scale = result.data(),
                  .zero_point = result.data() + channels},
                 threads(count));
    if (count == 1) continue;
    CHECK(same_bytes(out.data(), expected.data(), size));
    CHECK(same_bytes(sums[0].data(), sums[1].data(), 2 * channels));
  }
}

}  // namespace

int main() {
  for_each_isa([](Isa) {
    Rng rng;
    for (Touches touches : {Touches::kEnd, Touches::kStart}) {
      for (Sums sums : {Sums::kNone, Sums::kRun, Sums::kColumns}) {
        for (int64_t n = 0; n <= 80; ++n) run_equals_scalar(n, touches, sums, rng);
      }
    }
    for (int channel_dim : {-1, 0, 1, 2}) threads_do_not_change_bits(channel_dim, rng);
  });
}
