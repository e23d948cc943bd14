// Fractions of this machine's own peak that igemm reaches, a line for each ISA and shape.
//
//   bench_gemm [isa [M K N]]
//
// The peak of an ISA is a loop of its dot products on registers, 12 independent sums in one asm
// block, timed in this process between the kernels. Times are the minimum of many runs; the
// operands are reused, so that weights up to the size of L2 are read from there, as in a network
// that runs again and again.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "bench/csrc/peak.h"
#include "bench/csrc/weights.h"
#include "csrc/gemm/linear.h"

using namespace qk;

namespace {

struct Shape {
  int64_t m, k, n;
};
constexpr Shape kShapes[] = {
    {1, 1024, 1024},   {4, 1024, 1024},  {16, 1024, 1024}, {96, 512, 512}, {128, 768, 3072},
    {256, 1024, 1024}, {512, 2048, 512}, {196, 256, 256},  {784, 64, 256}, {784, 256, 64},
    {3136, 64, 64},    {3136, 24, 144},  {12544, 16, 96},
};

uint8_t* aligned(std::vector<uint8_t>& owner, int64_t bytes) {
  owner.resize(static_cast<size_t>(bytes) + 64);
  return owner.data() + (64 - reinterpret_cast<uintptr_t>(owner.data()) % 64) % 64;
}

void bench(const Shape& shape, Isa isa, bool input_signed) {
  const std::vector<int8_t> weight = normal_weights(shape.n, shape.k);
  std::vector<uint8_t> owner, a_owner, out_owner;
  uint8_t* a = aligned(a_owner, shape.m * shape.k);
  uint8_t* out = aligned(out_owner, shape.m * shape.n);
  uint32_t state = 1;
  const auto next = [&state] { return (state = state * 1664525u + 1013904223u) >> 16; };
  for (int64_t i = 0; i < shape.m * shape.k; ++i) a[i] = static_cast<uint8_t>(next());
  const float scale = 0.01f;
  const PackSource source{.weight = weight.data(),
                          .n = shape.n,
                          .taps = 1,
                          .depth = shape.k,
                          .stride_n = shape.k,
                          .stride_tap = 0,
                          .stride_k = 1,
                          .weight_scale = &scale,
                          .weight_zero_point = nullptr,
                          .per_tensor = true,
                          .bias = nullptr,
                          .input_scale = 0.01f,
                          .input_zero_point = 3,
                          .input_signed = input_signed,
                          .output_scale = 0.5f,
                          .epilogue = {}};
  const int64_t bytes = packed_igemm_bytes(shape.n, 1, shape.k, isa);
  uint8_t* packed = aligned(owner, bytes);
  PackedMatrix matrix;
  if (pack_igemm(source, isa, packed) != Status::kOk ||
      view_packed(packed, bytes, &matrix) != Status::kOk) {
    std::printf("packing failed\n");
    std::exit(1);
  }
  const LinearArgs args{matrix, a, shape.m, shape.k, out, nullptr, 0, false};
  const double macs = static_cast<double>(shape.m) * shape.k * shape.n;
  const int runs = static_cast<int>(macs > 1e8 ? 2 : macs > 1e7 ? 5 : 30);
  double best = 1e18, limit = 0;
  for (int round = 0; round < 10; ++round) {  // in turns: the clock of a busy machine drifts
    const double time = fastest_ns([&] { linear(args, kSerial); }, runs);
    const double rate = peak(isa);
    if (time < best) best = time;
    if (rate > limit) limit = rate;
  }
  std::printf(
      "%-10s %s M=%-5lld K=%-5lld N=%-5lld %9.2f us %7.1f GMAC/s  %.3f of peak %6.1f  weights "
      "%5.1f GB/s\n",
      isa_name(isa), input_signed ? "s8" : "u8", static_cast<long long>(shape.m),
      static_cast<long long>(shape.k), static_cast<long long>(shape.n), best / 1e3, macs / best,
      macs / best / limit, limit, static_cast<double>(shape.k * shape.n) / best);
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = kIsaCount - 1; i > 0; --i) {
    const Isa isa = static_cast<Isa>(i);
    if (argc > 1 && std::strcmp(argv[1], isa_name(isa)) != 0) continue;
    set_isa_cap(isa);
    if (isa_active() != isa) continue;
    if (argc > 4) {
      const Shape shape{std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4])};
      for (const bool input_signed : {false, true}) bench(shape, isa, input_signed);
      continue;
    }
    for (const Shape& shape : kShapes) bench(shape, isa, false);
    for (const Shape& shape : {kShapes[0], kShapes[5], kShapes[10]}) bench(shape, isa, true);
  }
  return 0;
}
