// fake_quant: every kernel equals the scalar one for every length, on either side of a guard page,
// for hostile values, and for every number of threads.
#include "csrc/fake_quant/fake_quant.h"

#include <cmath>
#include <limits>

#include "tests/csrc/check.h"

using namespace qk;
using namespace qk::test;

namespace {

struct Grid {
  float scale;
  int32_t zero_point, qmin, qmax;
};

// Among the random values: ties, NaN, infinities, the largest and the smallest floats.
void fill_hostile(Guarded<float>& x, float scale, Rng& rng) {
  const float inf = std::numeric_limits<float>::infinity();
  const float big = std::numeric_limits<float>::max(), tiny = 1e-42f;
  for (float& v : x) {
    v = rng.chance(0.2)   ? rng.pick({inf, -inf, std::nanf(""), big, -big, tiny, -0.0f, 0.0f})
        : rng.chance(0.3) ? (static_cast<float>(rng.integer(-200, 200)) + 0.5f) * scale
                          : rng.real(-8, 8);
  }
}

void run_equals_scalar(Rng& rng) {
  for (const Grid& grid : {Grid{0.037f, 0, -128, 127}, Grid{0.0625f, 3, 0, 255},
                           Grid{1.0f, -128, -128, 127}, Grid{1e-3f, 7, 0, 15}}) {
    for (int64_t n = 0; n <= 80; ++n) {
      for (Touches touches : {Touches::kEnd, Touches::kStart}) {
        CONTEXT("n=", n, " scale=", grid.scale, " zero_point=", grid.zero_point);
        Guarded<float> x(n, touches), y(n, touches), expected(n, touches);
        fill_hostile(x, grid.scale, rng);
        const float inv_scale = 1.0f / grid.scale;
        FakeQuantRun run{.x = x.data(),
                         .y = expected.data(),
                         .n = n,
                         .grid = {&grid.scale, &inv_scale, &grid.zero_point, false},
                         .qmin = grid.qmin,
                         .qmax = grid.qmax,
                         .stream = false};
        fake_quant_f32_scalar(run);
        run.y = y.data();
        run.stream = rng.chance(0.5);
        select_fake_quant_kernel(FloatType::kFloat32)(run);
        CHECK(same_bytes(y.data(), expected.data(), n));
      }
    }
  }
}

void threads_do_not_change_bits(Rng& rng) {
  const int64_t outer = 3, channels = 5, inner = 9001, size = outer * channels * inner;
  Guarded<float> x(size), expected(size), y(size), scale(channels);
  Guarded<int32_t> zero_point(channels);
  rng.fill(x);
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = rng.real(0.01f, 0.1f);
    zero_point[c] = static_cast<int32_t>(rng.integer(-128, 127));
  }
  StridedLayout<2> walk;
  walk.dims = 3;
  const int64_t sizes[3] = {outer, channels, inner}, strides[3] = {channels * inner, inner, 1};
  for (int d = 0; d < 3; ++d) {
    walk.size[d] = sizes[d];
    walk.stride[0][d] = walk.stride[1][d] = strides[d];
  }
  FakeQuantArgs args{.x = x.data(),
                     .y = expected.data(),
                     .type = FloatType::kFloat32,
                     .qmin = -128,
                     .qmax = 127,
                     .grid = {walk, 1, scale.data(), zero_point.data()}};
  fake_quant(args, kSerial);
  for (int count : {2, 3, 64, 500}) {
    CONTEXT("threads=", count);
    args.y = y.data();
    fake_quant(args, threads(count));
    CHECK(same_bytes(y.data(), expected.data(), size));
  }
}

}  // namespace

int main() {
  for_each_isa([](Isa) {
    Rng rng;
    run_equals_scalar(rng);
    threads_do_not_change_bits(rng);
  });
}
