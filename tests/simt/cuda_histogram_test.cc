// The histogram observer on the emulator: the bits of the CPU's, over batches that widen the range,
// for any number of bins and alignment; its barriers and its tail are needed.
#include <vector>

#include "csrc/histogram/cuda.cu"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"

using namespace qk;
using namespace qk::test;

namespace {

struct State {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  std::vector<float> histogram;
  explicit State(int64_t bins) : histogram(static_cast<size_t>(bins)) {}
};

// The extremes of the finite values.
template <typename T>
HistogramRange extremes(const T* x, int64_t n) {
  HistogramRange r{std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
  for (int64_t i = 0; i < n; ++i) {
    const float v = to_float(x[i]);
    if (v - v != 0.0f) continue;
    if (v < r.low) r.low = v;
    if (v > r.high) r.high = v;
  }
  return r;
}

template <typename T>
void batches_give_the_bits_of_the_cpu(FloatType type, int64_t bins, int64_t n, int64_t misalign,
                                      Rng& rng) {
  State cpu(bins), gpu(bins);
  float first = 1.0f, offset = 0.0f;
  for (int batch = 0; batch < 6; ++batch) {
    CONTEXT("type ", type, " bins ", bins, " n ", n, " at ", misalign, " batch ", batch);
    Guarded<T> x(n + misalign, Touches::kStart);
    for (T& v : x) {
      from_float(batch == 0 && bins % 2 == 0 ? 2.5f : rng.real(-first, first) + offset, &v);
      if (batch > 1 && rng.chance(0.02)) from_float(std::nanf(""), &v);
      if (batch > 1 && rng.chance(0.02)) from_float(-1.0f / 0.0f, &v);
    }
    if (batch == 3) {  // nothing of it is finite
      for (T& v : x) from_float(std::nanf(""), &v);
    }
    const HistogramRange range = extremes(x.data() + misalign, n);
    std::vector<uint8_t> space(static_cast<size_t>(histogram_workspace(n, bins)));
    observe_histogram({x.data() + misalign, type, n, range.low, range.high, &cpu.low, &cpu.high,
                       cpu.histogram.data(), bins, space.data()},
                      kSerial);
    Guarded<uint8_t> workspace(histogram_cuda_workspace(bins), Touches::kStart);
    rng.fill(workspace);
    simt::seed = rng.bits();
    CHECK_EQ(
        observe_histogram_cuda({x.data() + misalign, type, n, &range.low, &range.high, &gpu.low,
                                &gpu.high, gpu.histogram.data(), bins, workspace.data()},
                               nullptr),
        cudaSuccess);
    CHECK(same_bytes(gpu.histogram.data(), cpu.histogram.data(), bins));
    CHECK(same_bytes(&gpu.low, &cpu.low, 1) && same_bytes(&gpu.high, &cpu.high, 1));
    float total = 0;
    for (const float mass : cpu.histogram) total += mass;
    CHECK(total > 0, "nothing was counted");
    if (batch % 2 == 1) first *= 3.7f, offset += 1.0f;
  }
}

void counts_and_ranges_that_overflow_lose_nothing() {
  const float most = std::numeric_limits<float>::max();
  State s(8);
  const std::vector<float> x{-most, -1.0f, 0.0f, 1.0f, most};
  std::vector<uint8_t> space(static_cast<size_t>(histogram_workspace(5, 8)));
  for (int batch = 0; batch < 2; ++batch) {
    observe_histogram({x.data(), FloatType::kFloat32, 5, -most, most, &s.low, &s.high,
                       s.histogram.data(), 8, space.data()},
                      kSerial);
  }
  float total = 0;
  for (const float mass : s.histogram) total += mass;
  CHECK_EQ(total, 10.0f);
}

void a_range_grows_without_values() {
  State cpu(8), gpu(8);
  for (const HistogramRange& range : {HistogramRange{-1.0f, 1.0f}, HistogramRange{-3.0f, 2.0f}}) {
    std::vector<uint8_t> space(static_cast<size_t>(histogram_workspace(0, 8)));
    Guarded<uint8_t> workspace(histogram_cuda_workspace(8));
    observe_histogram({nullptr, FloatType::kFloat32, 0, range.low, range.high, &cpu.low, &cpu.high,
                       cpu.histogram.data(), 8, space.data()},
                      kSerial);
    CHECK_EQ(
        observe_histogram_cuda({nullptr, FloatType::kFloat32, 0, &range.low, &range.high, &gpu.low,
                                &gpu.high, gpu.histogram.data(), 8, workspace.data()},
                               nullptr),
        cudaSuccess);
    CHECK_EQ(gpu.low, range.low);
    CHECK(same_bytes(&gpu.low, &cpu.low, 1) && same_bytes(&gpu.high, &cpu.high, 1));
    CHECK(same_bytes(gpu.histogram.data(), cpu.histogram.data(), 8));
  }
}

struct Run {
  Guarded<float> x;
  HistogramRange range{-1.0f, 1.0f};
  State state{64};
  Guarded<uint8_t> workspace{histogram_cuda_workspace(64), Touches::kStart};
  explicit Run(int64_t n) : x(n) {
    Rng rng;
    for (float& v : x) v = rng.real(-1, 1);
  }
  void operator()(int64_t n) {
    observe_histogram_cuda({x.data(), FloatType::kFloat32, n, &range.low, &range.high, &state.low,
                            &state.high, state.histogram.data(), 64, workspace.data()},
                           nullptr);
  }
};

void broken_kernels_are_noticed() {
  Run run(5000);
  run(5000);
  for (const int barrier : {0, 1}) {
    expect_fault("shared byte", [&] {
      simt::sabotage.skip_barrier = barrier;
      run(5000);
    });
  }
  fault_of([&] { run(5001); });  // past the end
}

void values_are_read_16_bytes_at_a_time() {
  Run run(4096);
  simt::counters = {};
  run(4096);
  CHECK_EQ(simt::counters.vector_loads, 1024u);
}

}  // namespace

int main() {
  Rng rng(1);
  for (const int64_t bins : {2, 33, 2048}) {
    for (const int64_t n : {1, 7, 1000, 40000}) {
      for (const int64_t misalign : {0, 3}) {
        batches_give_the_bits_of_the_cpu<float>(FloatType::kFloat32, bins, n, misalign, rng);
        if (n > 2000) continue;
        batches_give_the_bits_of_the_cpu<BFloat16>(FloatType::kBFloat16, bins, n, misalign, rng);
        batches_give_the_bits_of_the_cpu<Float16>(FloatType::kFloat16, bins, n, misalign, rng);
      }
    }
  }
  batches_give_the_bits_of_the_cpu<float>(FloatType::kFloat32, kSharedBins + 1, 3000, 0, rng);
  counts_and_ranges_that_overflow_lose_nothing();
  a_range_grows_without_values();
  broken_kernels_are_noticed();
  values_are_read_16_bytes_at_a_time();
}
