// linear on the emulator: every kernel gives the CPU's bits for every output, grid and alignment;
// its copies and fragments meet no bank twice; broken instructions are noticed.
#include "csrc/gemm/cuda.cu"
#include "csrc/gemm/cuda_s8.cu"
#include "csrc/gemm/cuda_u8.cu"
#include "csrc/gemm/cuda_wgmma_sm90a.cu"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"
#include "tests/simt/linear_problem.h"

using namespace qk;
using namespace qk::test;

namespace {

// Each tile around its edges, whole and split.
void every_tile_gives_the_bits_of_the_cpu() {
  Rng rng(1);
  for (int tile = 0; tile < kCudaTileCount; ++tile) {
    const CudaTile& t = kCudaTiles[tile];
    for (const int splits : {1, 3}) {
      for (const OutputType output : kOutputs) {
        const bool bytes = output == OutputType::kU8 || output == OutputType::kS8;
        Case c{.m = t.rows + rng.pick({-1, 0, 1}),
               .n = t.columns + rng.pick({-16, -1, 0, 1}),
               .k = rng.integer(1, 5) * t.depth + rng.pick({-16, -3, 0, 5}),
               .output = output,
               .input_signed = rng.chance(0.5),
               .table = bytes && rng.chance(0.5),
               .residual = bytes && rng.chance(0.5),
               .residual_signed = rng.chance(0.5),
               .per_tensor = rng.chance(0.3)};
        if (splits > 1) c.k += 2 * t.depth;
        const int steps = static_cast<int>((c.k + t.depth - 1) / t.depth);
        simt::seed = rng.bits();
        Problem(c, rng).check({tile, steps > 2 * splits - 2 ? splits : 1, 0});
      }
    }
  }
}

void small_and_odd_shapes_give_the_bits_of_the_cpu() {
  Rng rng(2);
  for (int i = 0; i < 120; ++i) {
    Case c{.m = rng.pick<int64_t>({1, 2, 3, 7, 8, 9, 15, 16, 17, 33}),
           .n = rng.integer(1, 80),
           .k = rng.pick<int64_t>({1, 3, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 200}),
           .output = kOutputs[rng.integer(0, 5)],
           .input_signed = rng.chance(0.5),
           .weight_zero_points = rng.chance(0.4)};
    const bool bytes = c.output == OutputType::kU8 || c.output == OutputType::kS8;
    c.table = bytes && rng.chance(0.3);
    c.residual = bytes && rng.chance(0.3);
    c.residual_signed = rng.chance(0.5);
    c.misalign = rng.chance(0.5) ? 0 : rng.integer(1, 15);
    c.slack = rng.chance(0.5) ? -1 : rng.pick<int64_t>({0, 0, 1, 16});
    simt::seed = rng.bits();
    Problem(c, rng).check();
  }
}

// The same kernels with the instructions of capability 7.5.
void turing_gives_the_bits_of_the_cpu() {
  const simt::Device before = simt::device;
  simt::device = {7, 5, 40, 64 << 10, 64 << 10};
  CudaMachine machine;
  CHECK_EQ(cuda_machine(&machine), cudaSuccess);
  simt::counters = {};
  Rng rng(6);
  for (int tile = 0; tile < kCudaTileCount; ++tile) {
    const CudaTile& t = kCudaTiles[tile];
    if (t.needs_async_copies()) continue;
    for (const int splits : {1, 2}) {
      Case c{.m = t.rows + rng.pick({-1, 0, 1}),
             .n = t.columns + rng.pick({-16, -1, 0, 1}),
             .k = 5 * t.depth + rng.pick({-16, -3, 0, 5}),
             .output = kOutputs[rng.integer(0, 5)],
             .input_signed = rng.chance(0.5)};
      simt::seed = rng.bits();
      Problem(c, rng).check({tile, splits, 0});
    }
  }
  for (int i = 0; i < 20; ++i) {
    Problem({.m = rng.integer(1, 40),
             .n = rng.integer(1, 80),
             .k = rng.integer(1, 200),
             .input_signed = rng.chance(0.5),
             .weight_zero_points = rng.chance(0.5),
             .misalign = rng.integer(0, 3)},
            rng)
        .check();
  }
  CHECK_EQ(simt::counters.mmas, 0u);
  CHECK_EQ(simt::counters.copies, 0u);
  CHECK(simt::counters.small_mmas > 0);
  Problem problem({.m = 50, .n = 70, .k = 900}, rng);
  for (const int barrier : {0, 4}) {
    expect_fault("shared byte", [&] {
      simt::sabotage.skip_barrier = barrier;
      problem.check({4, 1, 0});
    });
  }
  simt::device = before;
}

void the_largest_sums_do_not_saturate() {
  Rng rng(3);
  for (const bool input_signed : {false, true}) {
    Problem({.m = 9,
             .n = 20,
             .k = 4096,
             .output = OutputType::kS32,
             .input_signed = input_signed,
             .weight_zero_points = true,
             .extremes = true},
            rng)
        .check({kCudaGeneralTile, 5, 0});
  }
}

void tiles_meet_no_bank_conflict() {
  Rng rng(4);
  for (int tile = 0; tile < kCudaTileCount; ++tile) {
    Problem problem({.m = kCudaTiles[tile].rows, .n = kCudaTiles[tile].columns, .k = 512}, rng);
    simt::counters = {};
    problem.check({tile, 1, 0});
    CHECK_EQ(simt::counters.ldmatrix_conflicts, 0u, "tile ", tile);
    CHECK_EQ(simt::counters.copy_conflicts, 0u, "tile ", tile);
    CHECK_EQ(simt::counters.mmas, static_cast<uint64_t>(kCudaTiles[tile].rows / 16 *
                                                        kCudaTiles[tile].columns / 8 * 512 / 32));
    CHECK_EQ(simt::counters.vector_stores,
             static_cast<uint64_t>(kCudaTiles[tile].rows * kCudaTiles[tile].columns / 16));
  }
}

void broken_instructions_are_noticed() {
  Rng rng(5);
  for (const int tile : {1, 3, 4}) {
    Problem problem({.m = 50, .n = 70, .k = 900}, rng);
    const auto broken = [&](auto&& sabotage) {
      return fault_of([&] {
        sabotage();
        problem.check({tile, 1, 0});
      });
    };
    broken([] { simt::sabotage.wait_for_fewer_groups = 1; });
    for (const int barrier : {0, 1, 4}) broken([=] { simt::sabotage.skip_barrier = barrier; });
    broken([] { simt::sabotage.skip_warp_barriers = true; });
    broken([] { simt::sabotage.copy_all_bytes = true; });
  }
}

void the_plan_fits_the_machine_and_has_no_cliffs() {
  const CudaMachine a100{80, 108, 163 << 10, 164 << 10}, l4{89, 58, 99 << 10, 100 << 10};
  const CudaMachine t4{75, 40, 64 << 10, 64 << 10};
  for (const CudaMachine& machine : {a100, l4, t4}) {
    for (const int64_t n : {64, 1000, 4096, 12288}) {
      for (const int64_t k : {16, 576, 4096, 16384}) {
        double before = 0;
        for (int64_t m = 9; m < 20000; m += m / 7 + 1) {
          const CudaGemmPlan plan = plan_cuda_gemm(m, n, k, 1, machine, kAllCudaTiles);
          const CudaTile& tile = kCudaTiles[plan.tile];
          CHECK(tile.shared_bytes() <= machine.shared_per_block);
          const int64_t steps = (k + tile.depth - 1) / tile.depth;
          const int64_t share = (steps + plan.splits - 1) / plan.splits;
          CHECK(share * (plan.splits - 1) < steps, "a split without a step");
          CHECK(plan.cycles >= before * 0.75, "m=", m, " n=", n, " k=", k, ": ", plan.cycles,
                " cycles after ", before);
          CHECK(before == 0 || plan.cycles <= before * 2.1 + 3000, "m=", m, " n=", n, " k=", k,
                ": ", plan.cycles, " cycles after ", before);
          before = plan.cycles;
        }
      }
    }
  }
  CHECK_EQ(plan_cuda_gemm(4096, 4096, 4096, 1, a100, kAllCudaTiles).splits, 1);
  CHECK(plan_cuda_gemm(16, 512, 16384, 1, a100, kAllCudaTiles).splits > 4);
  CHECK_EQ(plan_cuda_gemm(4096, 4096, 4096, 1, a100, kGeneralCudaTiles).tile, kCudaGeneralTile);
}

void a_build_says_which_gpu_it_needs() {
  CHECK_EQ(least_cuda_capability("sm_80 sm_90 compute_90 sm_90a"), 80);
  CHECK_EQ(least_cuda_capability("sm_90 compute_120"), 90);
  CHECK_EQ(least_cuda_capability("sm_75"), 75);
  CHECK_EQ(least_cuda_capability("sm_100a"), 100);
  CHECK_EQ(least_cuda_capability("sm_70 sm_80"), kCudaLeastCapability);
  CHECK_EQ(why_too_old(75, "sm_75 sm_80"), "");
  CHECK_EQ(why_too_old(90, "sm_80"), "");
  CHECK_EQ(why_too_old(75, "sm_80 sm_90 compute_90"),
           "needs a GPU of compute capability 8.0 or newer (built for sm_80 sm_90 compute_90), got "
           "7.5; build with its number in TORCH_CUDA_ARCH_LIST, or move the model to the CPU");
  CHECK(why_too_old(61, "sm_60").find("compute capability 7.5 or newer") != std::string::npos);
}

void wrong_lengths_are_refused() {
  CudaPackedFacts facts;
  const int64_t bytes = packed_cuda_bytes(40, 1, 64, {});
  CHECK_EQ(read_cuda_facts(bytes, 40, 1, 64, &facts), Status::kOk);
  CHECK_EQ(read_cuda_facts(bytes - 1, 40, 1, 64, &facts), Status::kBadShape);
  CHECK_EQ(read_cuda_facts(bytes + 64, 40, 1, 64, &facts), Status::kBadShape);
  CHECK_EQ(read_cuda_facts(bytes + 7, 40, 1, 64, &facts), Status::kBadShape);  // no such output
}

// Also where rows are rounded up to the same length, and where blocks are small.
void the_weight_of_another_layer_is_refused() {
  const CudaPackedFacts last{OutputType::kF16, true, true, true};
  for (const CudaPackedFacts& facts : {CudaPackedFacts{}, last}) {
    for (const int64_t n : {10, 64, 4096}) {
      for (const int64_t k : {1, 16, 64, 500, 1024}) {
        const int64_t bytes = packed_cuda_bytes(n, 1, k, facts);
        CudaPackedFacts read;
        for (int64_t other = 0; other < 2000; ++other) {
          const auto is_told_from = [other](int64_t size) {
            const int64_t by = other < size ? size - other : other - size;
            return by != 0 && (by < 59 || (size % 16 == 0 && other % 16 == 0 && by < 1024));
          };
          if (is_told_from(k)) {
            CHECK_EQ(read_cuda_facts(bytes, n, 1, other, &read), Status::kBadShape, n, " ", other);
          }
          if (is_told_from(n)) {
            CHECK_EQ(read_cuda_facts(bytes, other, 1, k, &read), Status::kBadShape, other, " ", k);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  wrong_lengths_are_refused();
  the_weight_of_another_layer_is_refused();
  a_build_says_which_gpu_it_needs();
  the_plan_fits_the_machine_and_has_no_cliffs();
  small_and_odd_shapes_give_the_bits_of_the_cpu();
  every_tile_gives_the_bits_of_the_cpu();
  turing_gives_the_bits_of_the_cpu();
  the_largest_sums_do_not_saturate();
  tiles_meet_no_bank_conflict();
  broken_instructions_are_noticed();
  return 0;
}
