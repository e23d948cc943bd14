// The transpose of bytes: every kernel gives what its formula says, for every number of channels
// and pixels around its blocks, dense and strided, with an unreadable page on either side of each
// buffer, and leaves the bytes between its pixels alone.
#include "csrc/image/image.h"

#include "tests/csrc/check.h"

using namespace qk;
using namespace qk::test;

namespace {

void check_interleave(InterleaveKernel kernel, int64_t channels, int64_t n, int64_t gap,
                      Touches side, Rng& rng) {
  CONTEXT("channels=", channels, " n=", n, " gap=", gap);
  const int64_t plane = n + gap, pixel = channels + gap;
  Guarded<uint8_t> planes(plane * (channels - 1) + n, side), out(pixel * (n - 1) + channels, side);
  rng.fill(planes);
  rng.fill(out);
  std::vector<uint8_t> expected(out.begin(), out.end());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < channels; ++c) expected[i * pixel + c] = planes[c * plane + i];
  }
  kernel({.planes = planes.data(),
          .plane_stride = plane,
          .channels = channels,
          .out = out.data(),
          .pixel_stride = pixel,
          .n = n});
  CHECK(same_bytes(out.data(), expected.data(), out.size()));
}

}  // namespace

int main() {
  Rng rng;
  for_each_isa([&](Isa) {
    const InterleaveKernel kernel = select_interleave_kernel();
    for (int64_t channels = 1; channels <= 70; ++channels) {
      for (int64_t n = 1; n <= 70; ++n) {
        const Touches side = rng.pick({Touches::kEnd, Touches::kStart});
        check_interleave(kernel, channels, n, rng.pick({0, 0, 1, 5}), side, rng);
      }
    }
    for (int round = 0; round < 50; ++round) {
      check_interleave(kernel, rng.integer(60, 300), rng.integer(60, 300), 0, Touches::kEnd, rng);
    }
  });
}
