// lookup, add, mul, cat and the pools on the emulator: the bits of the CPU's kernels, broadcast,
// strided, in and out of alignment.
#include <memory>

#include "csrc/pointwise/cuda.cu"
#include "csrc/pool/cuda.cu"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"

using namespace qk;
using namespace qk::test;

namespace {

BinaryGrid some_grid(Rng& rng) {
  BinaryGrid g{.a_signed = rng.chance(0.5),
               .b_signed = rng.chance(0.5),
               .out_signed = rng.chance(0.5),
               .a_scale = rng.real(0.01f, 0.1f),
               .b_scale = rng.real(0.01f, 0.1f),
               .out_scale = rng.real(0.02f, 0.2f),
               .a_zero_point = static_cast<int32_t>(rng.integer(0, 127)),
               .b_zero_point = static_cast<int32_t>(rng.integer(0, 127)),
               .out_zero_point = static_cast<int32_t>(rng.integer(10, 100)),
               .qmin = 3,
               .qmax = 120};
  return g;
}

// out is dense [outer, middle, inner]; an operand may lack a dimension or have gaps between rows.
void binary_gives_the_bits_of_the_cpu(int64_t outer, int64_t middle, int64_t inner, uint64_t turn) {
  Rng rng(turn);
  const int64_t misalign = rng.chance(0.6) ? 0 : rng.integer(1, 15);
  BinaryArgs args{};
  args.op = rng.chance(0.5) ? BinaryOp::kAdd : BinaryOp::kMul;
  args.grid = some_grid(rng);
  StridedLayout<3>& l = args.layout;
  l.dims = 3;
  const int64_t sizes[] = {outer, middle, inner};
  int64_t extent[3] = {1, 1, 1}, stride[3] = {1, 1, 1};
  for (int d = 2; d >= 0; --d) {
    l.size[d] = sizes[d];
    for (int k = 0; k < 3; ++k) {
      // Of a result's dimension at most one operand lacks it.
      const bool broadcast = k > 0 && rng.chance(0.25) && (k == 1 || l.stride[1][d] != 0);
      l.stride[k][d] = broadcast ? 0 : stride[k];
      if (broadcast) continue;
      extent[k] += (sizes[d] - 1) * stride[k];
      stride[k] *= sizes[d];
      if (k > 0 && d == 2 && rng.chance(0.3)) stride[k] += rng.pick<int64_t>({1, 16});
    }
  }
  CONTEXT("op ", args.op, " ", outer, "x", middle, "x", inner, " turn ", turn);
  Guarded<uint8_t> a(misalign + extent[1], Touches::kStart), b(extent[2], Touches::kStart);
  Guarded<uint8_t> out(extent[0], Touches::kStart), expected(extent[0]);
  rng.fill(a), rng.fill(b);
  args.a = a.data() + misalign, args.b = b.data();
  args.out = expected.data();
  binary(args, kSerial);
  args.out = out.data();
  simt::seed = rng.bits();
  CHECK_EQ(binary_cuda(args, nullptr), cudaSuccess);
  CHECK(same_bytes(out.data(), expected.data(), out.size()));

  Guarded<uint8_t> table(256);
  rng.fill(table);
  LookupArgs unary{args.a, expected.data(), table.data(), {}};
  unary.layout.dims = 3;
  for (int d = 0; d < 3; ++d) {
    unary.layout.size[d] = sizes[d];
    for (int k = 0; k < 2; ++k) unary.layout.stride[k][d] = l.stride[k][d];
  }
  if (inner > 1 && l.stride[1][2] == 0) return;  // lookup takes contiguous rows
  lookup(unary, kSerial);
  unary.out = out.data();
  CHECK_EQ(lookup_cuda(unary, nullptr), cudaSuccess);
  CHECK(same_bytes(out.data(), expected.data(), out.size()));
}

void cat_gives_the_bits_of_the_cpu() {
  Rng rng(2);
  for (int turn = 0; turn < 12; ++turn) {
    const int64_t rows = rng.pick<int64_t>({0, 1, 5, 33}), count = rng.integer(1, 4);
    const int64_t unit = rng.pick<int64_t>({1, 16});
    std::vector<std::unique_ptr<Guarded<uint8_t>>> owners;
    std::vector<CatInput> inputs;
    Guarded<uint8_t> tables(count * 256);
    rng.fill(tables);
    int64_t width = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t w = rng.integer(0, 5) * unit;
      owners.push_back(std::make_unique<Guarded<uint8_t>>(rows * w, Touches::kStart));
      rng.fill(*owners.back());
      width += w;
      inputs.push_back({owners.back()->data(), w, tables.data() + 256 * i});
    }
    CONTEXT("rows ", rows, " width ", width);
    Guarded<uint8_t> out(rows * width, Touches::kStart), expected(rows * width);
    cat({inputs.data(), count, expected.data(), rows}, kSerial);
    CHECK_EQ(cat_cuda({inputs.data(), count, out.data(), rows}, nullptr), cudaSuccess);
    CHECK(same_bytes(out.data(), expected.data(), out.size()));
  }
}

void pools_give_the_bits_of_the_cpu() {
  Rng rng(3);
  for (int turn = 0; turn < 60; ++turn) {
    PoolGeometry g{};
    g.batch = rng.integer(1, 2), g.channels = rng.pick<int64_t>({1, 3, 4, 16, 18, 32});
    g.adaptive = rng.chance(0.3);
    for (int d = 0; d < 3; ++d) {
      g.in[d] = d == 0 && rng.chance(0.7) ? 1 : rng.integer(1, 7);
      g.kernel[d] = rng.integer(1, 3), g.stride[d] = rng.integer(1, 3);
      g.dilation[d] = rng.integer(1, 2);
      const int64_t reach = g.dilation[d] * (g.kernel[d] - 1) + 1;
      if (reach > g.in[d]) g.kernel[d] = 1, g.dilation[d] = 1;
      g.padding[d] = rng.integer(0, (g.dilation[d] * (g.kernel[d] - 1) + 1) / 2);
      g.out[d] = g.adaptive ? rng.integer(1, 4)
                            : (g.in[d] + 2 * g.padding[d] - g.dilation[d] * (g.kernel[d] - 1) - 1) /
                                      g.stride[d] +
                                  1;
    }
    CONTEXT("turn ", turn, " channels ", g.channels, " adaptive ", g.adaptive);
    Guarded<uint8_t> q(g.batch * g.in[0] * g.in[1] * g.in[2] * g.channels, Touches::kStart);
    const int64_t size = g.batch * g.out[0] * g.out[1] * g.out[2] * g.channels;
    Guarded<uint8_t> out(size, Touches::kStart), expected(size);
    rng.fill(q);
    simt::seed = rng.bits();
    if (!g.adaptive) {
      MaxPoolArgs args{q.data(), expected.data(), rng.chance(0.5), g};
      max_pool(args, kSerial);
      args.out = out.data();
      CHECK_EQ(max_pool_cuda(args, nullptr), cudaSuccess);
      CHECK(same_bytes(out.data(), expected.data(), size));
    }
    for (int64_t& v : g.dilation) v = 1;
    if (!g.adaptive) {
      for (int d = 0; d < 3; ++d) {
        g.padding[d] = rng.integer(0, g.kernel[d] / 2);
        g.out[d] = (g.in[d] + 2 * g.padding[d] - g.kernel[d]) / g.stride[d] + 1;
      }
    }
    const int64_t mean_size = g.batch * g.out[0] * g.out[1] * g.out[2] * g.channels;
    Guarded<uint8_t> mean(mean_size, Touches::kStart), mean_expected(mean_size);
    AvgPoolArgs args{q.data(),
                     mean_expected.data(),
                     rng.chance(0.5),
                     rng.chance(0.5),
                     g,
                     rng.chance(0.5),
                     rng.pick<int64_t>({0, 0, 5}),
                     rng.real(0.2f, 2.0f),
                     static_cast<int32_t>(rng.integer(0, 100)),
                     static_cast<int32_t>(rng.integer(0, 100)),
                     0,
                     120};
    avg_pool(args, kSerial);
    args.out = mean.data();
    CHECK_EQ(avg_pool_cuda(args, nullptr), cudaSuccess);
    CHECK(same_bytes(mean.data(), mean_expected.data(), mean_size));
  }
}

// Where 32 bits do not hold what the windows are computed from.
void a_stride_beyond_32_bits_gives_the_bits_of_the_cpu() {
  Rng rng(4);
  PoolGeometry g{.batch = 2,
                 .channels = 18,
                 .in = {1, 5, 4},
                 .out = {1, 2, 1},
                 .adaptive = false,
                 .kernel = {1, 3, 2},
                 .stride = {1, 2, INT32_MAX},
                 .padding = {0, 0, 0},
                 .dilation = {1, 1, 1}};
  Guarded<uint8_t> q(2 * 5 * 4 * 18, Touches::kStart), out(2 * 2 * 18, Touches::kStart);
  Guarded<uint8_t> expected(out.size());
  rng.fill(q);
  MaxPoolArgs largest{q.data(), expected.data(), true, g};
  max_pool(largest, kSerial);
  largest.out = out.data();
  CHECK_EQ(max_pool_cuda(largest, nullptr), cudaSuccess);
  CHECK(same_bytes(out.data(), expected.data(), out.size()));
  AvgPoolArgs mean{q.data(), expected.data(), false, false, g, true, 0, 0.7f, 9, 5, 0, 255};
  avg_pool(mean, kSerial);
  mean.out = out.data();
  CHECK_EQ(avg_pool_cuda(mean, nullptr), cudaSuccess);
  CHECK(same_bytes(out.data(), expected.data(), out.size()));
}

// A tensor that is shorter than its layout says: the guard page behind it is hit.
void a_dropped_bound_is_noticed() {
  Guarded<uint8_t> q(100), out(100);
  uint8_t table[256] = {};
  LookupArgs args{q.data(), out.data(), table, {}};
  args.layout.size[0] = 101;
  args.layout.stride[0][0] = args.layout.stride[1][0] = 1;
  fault_of([&] { lookup_cuda(args, nullptr); });
}

}  // namespace

int main() {
  uint64_t turn = 0;
  for (const int64_t inner : {1, 15, 16, 32, 48}) {
    for (const int64_t middle : {1, 5}) {
      for (int i = 0; i < 12; ++i) binary_gives_the_bits_of_the_cpu(3, middle, inner, ++turn);
    }
  }
  cat_gives_the_bits_of_the_cpu();
  pools_give_the_bits_of_the_cpu();
  a_stride_beyond_32_bits_gives_the_bits_of_the_cpu();
  a_dropped_bound_is_noticed();
}
