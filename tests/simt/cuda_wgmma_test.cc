// The kernel of sm_90a on the emulator: the CPU's bits around every edge, for any number of blocks;
// the barriers of its ring, its fences and its waits are needed.
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

CudaGemmPlan plan_of(int blocks) { return {.tile = kCudaWgmmaTile, .wgmma_blocks = blocks}; }

void edges_give_the_bits_of_the_cpu() {
  Rng rng(1);
  for (const int64_t m : {1, 64, 65, 127, 128, 129, 270}) {
    for (const int64_t n : {1, 16, 100, 128, 129, 300}) {
      Case c{.m = m,
             .n = n,
             .k = rng.pick<int64_t>({1, 15, 16, 127, 128, 129, 500, 1100}),
             .output = kOutputs[rng.integer(0, 5)],
             .input_signed = rng.chance(0.5),
             .per_tensor = rng.chance(0.3)};
      const bool bytes = c.output == OutputType::kU8 || c.output == OutputType::kS8;
      c.table = bytes && rng.chance(0.4);
      c.residual = bytes && rng.chance(0.4);
      c.residual_signed = rng.chance(0.5);
      simt::seed = rng.bits();
      Problem(c, rng).check(plan_of(rng.pick({1, 2, 132})));
    }
  }
}

void every_output_gives_the_bits_of_the_cpu() {
  Rng rng(2);
  for (const OutputType output : kOutputs) {
    for (const bool input_signed : {false, true}) {
      Problem({.m = 200, .n = 144, .k = 700, .output = output, .input_signed = input_signed}, rng)
          .check(plan_of(2));
    }
  }
}

void the_largest_sums_do_not_saturate() {
  Rng rng(3);
  for (const bool input_signed : {false, true}) {
    Problem({.m = 70,
             .n = 20,
             .k = 4096,
             .output = OutputType::kS32,
             .input_signed = input_signed,
             .extremes = true},
            rng)
        .check(plan_of(1));
  }
}

// Rows with a stride of their own.
void rows_with_room_between_them_give_the_bits_of_the_cpu() {
  Rng rng(4);
  Problem({.m = 100, .n = 60, .k = 256, .slack = 16}, rng).check(plan_of(1));
  Problem({.m = 100, .n = 60, .k = 250, .slack = 6}, rng).check(plan_of(1));
}

void it_multiplies_on_tensor_cores_alone() {
  Rng rng(5);
  Problem problem({.m = 256, .n = 128, .k = 512}, rng);
  simt::counters = {};
  problem.check(plan_of(1));
  CHECK_EQ(simt::counters.wgmmas, uint64_t{2} * 8 * 512 / 32);
  CHECK_EQ(simt::counters.boxes, uint64_t{2} * 2 * 512 / 128);
  CHECK_EQ(simt::counters.mmas, 0u);
  CHECK_EQ(simt::counters.vector_stores, uint64_t{256} * 128 / 16);
}

void broken_instructions_are_noticed() {
  Rng rng(6);
  Problem problem({.m = 150, .n = 70, .k = 1400}, rng);
  const auto broken = [&](const char* words, auto&& sabotage) {
    expect_fault(words, [&] {
      sabotage();
      problem.check(plan_of(1));
    });
  };
  // Depending on who goes first, there is no barrier yet, or none that others may use.
  broken("mbarrier.try_wait", [] { simt::sabotage.skip_barrier = 0; });
  broken("fence.mbarrier_init", [] { simt::sabotage.skip_barrier_fence = true; });
  broken("simt:", [] { simt::sabotage.skip_barrier_waits = true; });
  // The stage goes back before it is read, and the last sums are not there.
  broken("while a box may still write it", [] { simt::sabotage.wait_for_fewer_products = 1; });
  broken("shared byte", [] { simt::sabotage.skip_warp_barriers = true; });
  // Bytes behind the end of a row are no zeros.
  Problem odd({.m = 100, .n = 60, .k = 200, .slack = 8}, rng);
  fault_of([&] {
    simt::sabotage.copy_all_bytes = true;
    odd.check(plan_of(1));
  });
}

void it_runs_only_where_it_is_asked_for() {
  CudaMachine h100{90, 132, 227 << 10, 228 << 10};
  alignas(16) uint8_t bytes[16] = {};
  LinearCudaArgs args{};
  args.n = 512, args.depth = 512, args.input = bytes, args.rows = 512, args.input_row_stride = 512;
  CHECK_EQ(plan_linear_cuda(args, h100).wgmma_blocks, 0);
  h100.wgmma = true;
  CHECK_EQ(plan_linear_cuda(args, h100).wgmma_blocks, 132);
  CHECK_EQ(linear_cuda_workspace(args, h100), 0);
  const auto refused = [&](auto&& change) {
    CudaMachine machine = h100;
    LinearCudaArgs other = args;
    change(machine, other);
    return plan_linear_cuda(other, machine).wgmma_blocks == 0;
  };
  CHECK(refused([](CudaMachine& m, LinearCudaArgs&) { m.capability = 100; }));
  CHECK(refused([](CudaMachine& m, LinearCudaArgs&) { m.capability = 89; }));
  CHECK(refused([](CudaMachine&, LinearCudaArgs& a) { a.rows = 64; }));
  CHECK(refused([](CudaMachine&, LinearCudaArgs& a) { a.input += 1; }));
  CHECK(refused([](CudaMachine&, LinearCudaArgs& a) { a.input_row_stride = 520; }));
  CHECK(refused([](CudaMachine&, LinearCudaArgs& a) { a.input_row_stride = 0; }));
  CHECK(refused([](CudaMachine&, LinearCudaArgs& a) { a.depth = 0; }));
  CHECK(refused([](CudaMachine&, LinearCudaArgs& a) { a.facts.weight_zero_points = true; }));
}

}  // namespace

int main() {
  it_runs_only_where_it_is_asked_for();
  edges_give_the_bits_of_the_cpu();
  every_output_gives_the_bits_of_the_cpu();
  the_largest_sums_do_not_saturate();
  rows_with_room_between_them_give_the_bits_of_the_cpu();
  it_multiplies_on_tensor_cores_alone();
  broken_instructions_are_noticed();
}
