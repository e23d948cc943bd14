// fake_quant on the emulator: the bits of the CPU's scalar kernel, in and out of alignment.
#include "csrc/fake_quant/cuda.cu"
#include "csrc/fake_quant/fake_quant.h"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"

using namespace qk;
using namespace qk::test;

namespace {

struct Shape {
  int64_t outer, channels, inner;
};

void equals_the_cpu(const Shape& shape, int64_t misalign) {
  CONTEXT("shape ", shape.outer, "x", shape.channels, "x", shape.inner, " misalign ", misalign);
  Rng rng;
  const int64_t size = shape.outer * shape.channels * shape.inner;
  Guarded<float> x(size + misalign, Touches::kStart), y(size + misalign, Touches::kStart);
  Guarded<float> expected(size), scale(shape.channels);
  Guarded<int32_t> zero_point(shape.channels);
  const float inf = std::numeric_limits<float>::infinity();
  for (float& v : x) v = rng.chance(0.1) ? rng.pick({inf, -inf, -0.0f, 1e30f}) : rng.real(-9, 9);
  for (int64_t c = 0; c < shape.channels; ++c) {
    scale[c] = rng.real(0.01f, 0.1f);
    zero_point[c] = static_cast<int32_t>(rng.integer(0, 255));
  }
  for (int64_t i = 0; i < size; ++i) {
    const int64_t c = i / shape.inner % shape.channels;
    expected[i] = fake_quant(x[misalign + i], scale[c], 1.0f / scale[c], zero_point[c], 0, 255);
  }
  for (simt::seed = 1; simt::seed <= 2; ++simt::seed) {
    CHECK_EQ(fake_quant_cuda({.x = x.data() + misalign,
                              .y = y.data() + misalign,
                              .outer = shape.outer,
                              .channels = shape.channels,
                              .inner = shape.inner,
                              .scale = scale.data(),
                              .zero_point = zero_point.data(),
                              .qmin = 0,
                              .qmax = 255},
                             nullptr),
             cudaSuccess);
    CHECK(same_bytes(y.data() + misalign, expected.data(), size));
  }
}

}  // namespace

int main() {
  for (const Shape& shape : {Shape{1, 1, 1}, {1, 1, 1024}, {1, 1, 2051}, {2, 3, 5}, {4, 7, 1}}) {
    for (int64_t misalign = 0; misalign < 4; ++misalign) equals_the_cpu(shape, misalign);
  }
}
