// The emulator itself: its instructions do what PTX says, and each kind of mistake is noticed.
#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "csrc/base/cuda_sm90.cuh"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"

using namespace qk;
using namespace qk::cuda;
using namespace qk::test;

namespace {

void run(int threads, uint32_t shared_bytes, const std::function<void()>& body, int blocks = 1) {
  for (simt::seed = 1; simt::seed <= 3; ++simt::seed) {
    simt::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes, body);
  }
}

uint32_t lane() { return threadIdx.x % kWarpSize; }

void shuffles_and_votes_see_all_lanes() {
  run(64, 0, [] {
    uint32_t sum = threadIdx.x;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    CHECK_EQ(sum, threadIdx.x / 32 * 1024 + 496);
    CHECK_EQ(__ballot_sync(kAllLanes, lane() % 3 == 0), 0x49249249u);
  });
}

// In which order a seed lets blocks and warps begin.
std::vector<uint32_t> order_of(uint64_t seed) {
  std::vector<uint32_t> order;
  simt::seed = seed;
  simt::launch(6, 256, 0, [&] {
    if (lane() == 0) order.push_back(blockIdx.x * 8 + threadIdx.x / kWarpSize);
  });
  return order;
}

void the_seed_decides_the_order_of_warps_and_blocks() {
  CHECK(order_of(1) == order_of(1));
  CHECK(order_of(1) != order_of(2));
  std::vector<uint32_t> all = order_of(3);
  CHECK(!std::is_sorted(all.begin(), all.end()));
  std::sort(all.begin(), all.end());
  CHECK_EQ(all.size(), 48u);
  for (uint32_t i = 0; i < 48; ++i) CHECK_EQ(all[i], i);
}

// A 16x32 by 32x8 product with known fragments, by ldmatrix and mma.
void mma_multiplies() {
  Rng rng;
  Guarded<uint8_t> a(16 * 32);
  Guarded<int8_t> b(8 * 32);
  rng.fill(a), rng.fill(b);
  Guarded<int32_t> sums(16 * 8);
  run(32, 16 * 32 + 16 * 32, [&] {
    const uint32_t base = shared_memory();
    copy_async_16(base + lane() * 16, a.data() + lane() * 16, 16);
    copy_async_16(base + 512 + lane() * 16, b.data() + lane() % 16 * 16, lane() < 16 ? 16 : 0);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    uint32_t fa[4], fb[4];
    ldmatrix_x4(fa, base + lane() % 16 * 32 + lane() / 16 * 16);
    ldmatrix_x4(fb, base + 512 + (lane() % 8 + lane() / 16 * 8) * 32 + lane() / 8 % 2 * 16);
    int32_t c[4] = {1, 1, 1, 1};
    mma_m16n8k32<false>(c, fa, {fb[0], fb[1]});
    for (uint32_t i = 0; i < 4; ++i) {
      sums[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = c[i];
    }
  });
  for (int64_t i = 0; i < 16; ++i) {
    for (int64_t j = 0; j < 8; ++j) {
      int32_t expected = 1;
      for (int64_t k = 0; k < 32; ++k) expected += a[i * 32 + k] * b[j * 32 + k];
      CHECK_EQ(sums[i * 8 + j], expected);
    }
  }
}

void dot4_multiplies_signed_and_unsigned() {
  CHECK_EQ(dot4<true>(5, 0xff80027fu, 0x01ff0280u), 5 - 1 + 128 + 4 - 127 * 128);
  CHECK_EQ(dot4<false>(5, 0xff80027fu, 0x01ff0280u), 5 + 255 - 128 + 4 - 127 * 128);
}

// Neighbours exchange values through shared memory.
void exchange(bool barrier) {
  shared_store_u32(shared_memory() + threadIdx.x * 4, threadIdx.x);
  if (barrier) __syncthreads();
  CHECK_EQ(shared_load_u32(shared_memory() + (threadIdx.x ^ 32) * 4), threadIdx.x ^ 32);
}

void a_missing_barrier_is_a_race() {
  run(64, 256, [] { exchange(true); });
  // Depending on who goes first, the byte is stale or not there yet.
  expect_fault("of shared byte", [] { run(64, 256, [] { exchange(false); }); });
  expect_fault("of shared byte", [] {
    simt::sabotage.skip_barrier = 0;
    run(64, 256, [] { exchange(true); });
  });
}

void a_barrier_of_the_warp_is_enough_inside_a_warp_only() {
  const auto reverse = [](uint32_t with) {
    shared_store_u32(shared_memory() + threadIdx.x * 4, threadIdx.x);
    __syncwarp();
    shared_load_u32(shared_memory() + (threadIdx.x ^ with) * 4);
  };
  run(64, 256, [&] { reverse(31); });
  expect_fault("of shared byte", [&] { run(64, 256, [&] { reverse(63); }); });
  expect_fault("of shared byte", [&] {
    simt::sabotage.skip_warp_barriers = true;
    run(64, 256, [&] { reverse(31); });
  });
}

void writing_what_others_still_read_is_a_race() {
  const auto body = [](bool barrier) {
    shared_store_u32(shared_memory() + threadIdx.x * 4, 1);
    __syncthreads();
    shared_load_u32(shared_memory() + (threadIdx.x ^ 32) * 4);
    if (barrier) __syncthreads();
    shared_store_u32(shared_memory() + threadIdx.x * 4, 2);
  };
  run(64, 256, [&] { body(true); });
  expect_fault("race: ", [&] { run(64, 256, [&] { body(false); }); });
}

// A ring of three stages, read by the other warp.
void pipeline(const Guarded<uint8_t>& data, int steps) {
  const uint32_t base = shared_memory(), mine = threadIdx.x * 16, other = (threadIdx.x ^ 32) * 16;
  const auto fetch = [&](int step) {
    if (step < steps) {
      copy_async_16(base + static_cast<uint32_t>(step % 3) * 1024 + mine,
                    data.data() + step * 1024 + mine, 16);
    }
    commit_copies();
  };
  fetch(0), fetch(1);
  for (int step = 0; step < steps; ++step) {
    wait_copies<1>();
    __syncthreads();
    fetch(step + 2);
    const uint4 v = shared_load_u128(base + static_cast<uint32_t>(step % 3) * 1024 + other);
    CHECK(std::memcmp(&v, data.data() + step * 1024 + other, 16) == 0);
  }
}

void cp_async_lands_when_it_must() {
  Guarded<uint8_t> data(7 * 1024);
  Rng().fill(data);
  run(64, 3072, [&] { pipeline(data, 7); });
  expect_fault("while cp.async may still write it", [&] {
    simt::sabotage.wait_for_fewer_groups = 1;
    run(64, 3072, [&] { pipeline(data, 7); });
  });
  expect_fault("simt:", [&] {
    simt::sabotage.skip_barrier = 3;
    run(64, 3072, [&] { pipeline(data, 7); });
  });
}

void an_ignored_predicate_reads_past_the_end() {
  Guarded<uint8_t> data(63 * 16);  // ends at a page that cannot be read
  const auto body = [&] {
    copy_async_16(threadIdx.x * 16, data.data() + threadIdx.x * 16, threadIdx.x < 63 ? 16 : 0);
  };
  run(64, 1024, body);
  fault_of([&] {
    simt::sabotage.copy_all_bytes = true;
    run(64, 1024, body);
  });
}

void addresses_are_checked() {
  Guarded<uint8_t> bytes(64);
  expect_fault("misaligned load of 16", [&] { run(1, 0, [&] { load_16(bytes.data() + 8); }); });
  expect_fault("misaligned store of 16",
               [&] { run(1, 0, [&] { store_16(bytes.data() + 4, uint4{}); }); });
  expect_fault("past its end", [] { run(1, 64, [] { shared_store_u32(64, 0); }); });
  expect_fault("is not aligned", [] { run(1, 64, [] { shared_store_u32(2, 0); }); });
  expect_fault("never written", [] { run(1, 64, [] { shared_load_u32(0); }); });
}

void threads_that_do_not_meet_are_faults() {
  expect_fault("lanes of a warp meet in", [] {
    run(32, 0, [] {
      if (lane() < 16) {
        __ballot_sync(kAllLanes, true);
      } else {
        __shfl_xor_sync(kAllLanes, 1, 1);
      }
    });
  });
  expect_fault("a lane ended while", [] {
    run(32, 0, [] {
      if (lane() < 31) __ballot_sync(kAllLanes, true);
    });
  });
  expect_fault("deadlock", [] {
    run(32, 0, [] {
      if (lane() < 16) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    });
  });
}

// 64 rows of A and 128 of B, as boxes, and the sums of the first warpgroup.
void wgmma_multiplies_boxes() {
  Rng rng;
  Guarded<uint8_t> a(64 * 128, Touches::kStart);
  Guarded<int8_t> b(128 * 128, Touches::kStart);
  rng.fill(a), rng.fill(b);
  Guarded<int32_t> sums(64 * 128);
  TensorMap map_a, map_b;
  CHECK_EQ(make_tensor_map(&map_a, a.data(), 96, 64, 128, 64), cudaSuccess);
  CHECK_EQ(make_tensor_map(&map_b, b.data(), 128, 128, 128, 128), cudaSuccess);
  CHECK_EQ(make_tensor_map(&map_b, b.data() + 8, 96, 128, 128, 128), cudaErrorInvalidValue);
  CHECK_EQ(make_tensor_map(&map_b, b.data(), 96, 128, 120, 128), cudaErrorInvalidValue);
  CHECK_EQ(make_tensor_map(&map_b, b.data(), 128, 128, 128, 128), cudaSuccess);
  const auto body = [&](bool fence, uint32_t to) {
    constexpr uint32_t kB = 64 * 128, kBarrier = kB + 128 * 128 + 1024;
    if (threadIdx.x == 0) {
      barrier_init(kBarrier, 1);
      barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      barrier_arrive_expecting(kBarrier, 192 * 128);
      copy_box(to, map_a, 0, 0, kBarrier);
      copy_box(to + kB, map_b, 0, 0, kBarrier);
    }
    barrier_wait(kBarrier, 0);
    int32_t c[16][4] = {};
    if (fence) wgmma_fence();
    for (uint64_t slice = 0; slice < 4; ++slice) {
      wgmma_m64n128k32<false>(c, box_descriptor(to) + slice * 2,
                              box_descriptor(to + kB) + slice * 2);
    }
    wgmma_commit();
    CHECK_EQ(static_cast<uint32_t>(c[0][0]), 0xa5a5a5a5u);  // not there yet
    wgmma_wait<0>();
    for (uint32_t i = 0; i < 64; ++i) {
      const uint32_t row = threadIdx.x / 32 * 16 + lane() / 4 + i / 2 % 2 * 8;
      sums[row * 128 + i / 4 * 8 + lane() % 4 * 2 + i % 2] = c[i / 4][i % 4];
    }
  };
  constexpr uint32_t kShared = 192 * 128 + 1024 + 8;
  run(128, kShared, [&] { body(true, 0); });
  for (int64_t i = 0; i < 64; ++i) {
    for (int64_t j = 0; j < 128; ++j) {
      int32_t expected = 0;
      for (int64_t k = 0; k < 96; ++k) expected += a[i * 128 + k] * b[j * 128 + k];
      CHECK_EQ(sums[i * 128 + j], expected);
    }
  }
  expect_fault("without a wgmma.fence", [&] { run(128, kShared, [&] { body(false, 0); }); });
  expect_fault("goes to a multiple of 1024", [&] { run(128, kShared, [&] { body(true, 512); }); });
}

void barriers_that_nobody_ends_are_faults() {
  expect_fault("deadlock", [] {
    run(32, 8, [] {
      if (lane() == 0) barrier_init(0, 2);
      __syncthreads();
      if (lane() == 0) barrier_arrive(0);
      barrier_wait(0, 0);
    });
  });
}

// 8 rows of 128 bytes read column by column, with and without a swizzle.
uint64_t conflicts_of_columns(bool swizzled) {
  const uint64_t before = simt::counters.ldmatrix_conflicts;
  simt::launch(1u, 32u, 32 * 128, [&] {
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      shared_store_u128(lane() * 128 + chunk * 16, uint4{});
    }
    __syncwarp();
    uint32_t r[4];
    const uint32_t chunk = swizzled ? 3 ^ lane() % 8 : 3;
    ldmatrix_x4(r, lane() * 128 + chunk * 16);
  });
  return simt::counters.ldmatrix_conflicts - before;
}

void bank_conflicts_are_counted() {
  CHECK_EQ(conflicts_of_columns(true), 0u);
  CHECK_EQ(conflicts_of_columns(false), 28u);  // 4 matrices, 8 passes each instead of 1

  const auto conflicts_of_stride = [](uint32_t stride) {
    const uint64_t before = simt::counters.shared_conflicts;
    simt::launch(1u, 32u, 32 * 132, [&] { shared_store_u32(lane() * stride, 0); });
    return simt::counters.shared_conflicts - before;
  };
  CHECK_EQ(conflicts_of_stride(4), 0u);
  CHECK_EQ(conflicts_of_stride(8), 1u);
  CHECK_EQ(conflicts_of_stride(128), 31u);
  CHECK_EQ(conflicts_of_stride(132), 0u);
}

void blocks_add_up() {
  Guarded<int32_t> sum(1);
  simt::launch(37u, 64u, 0, [&] { atomicAdd(sum.data(), static_cast<int32_t>(blockIdx.x)); });
  CHECK_EQ(sum[0], 64 * 37 * 36 / 2);
}

}  // namespace

int main() {
  shuffles_and_votes_see_all_lanes();
  the_seed_decides_the_order_of_warps_and_blocks();
  mma_multiplies();
  dot4_multiplies_signed_and_unsigned();
  a_missing_barrier_is_a_race();
  a_barrier_of_the_warp_is_enough_inside_a_warp_only();
  writing_what_others_still_read_is_a_race();
  cp_async_lands_when_it_must();
  an_ignored_predicate_reads_past_the_end();
  addresses_are_checked();
  threads_that_do_not_meet_are_faults();
  wgmma_multiplies_boxes();
  barriers_that_nobody_ends_are_faults();
  bank_conflicts_are_counted();
  blocks_add_up();
  return 0;
}
