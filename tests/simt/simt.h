// A SIMT emulator: runs the CUDA kernels of csrc/ on the CPU, as they are.
//
// A test includes a .cu file; <cuda_runtime.h> is then the one of this folder, and the device
// functions of csrc/base/cuda.cuh call the models below. Every thread of a block is a fiber, and a
// fiber runs until it must wait for others: at a barrier, a shuffle, an mma. Which warp goes on,
// and in which order blocks run, is drawn from QK_TEST_SEED. What is checked:
//
//   global memory   vector accesses are aligned; bounds by AddressSanitizer and guard pages
//   shared memory   bounds, alignment, no read of bytes never written, and no race: two threads
//                   touch a byte, one of them writes, and no barrier lies between (a barrier of the
//                   warp is enough inside a warp)
//   cp.async        lands as late as it may, at the wait that forces it; until then its target
//                   holds poison and any access to it is a fault
//   Hopper          see hopper.h: barriers in shared memory, boxes by TMA, wgmma
//   warps           lanes meet in the same operation with the same mask
//   barriers        every thread that is left arrives, or nothing moves on: a deadlock is a fault
//
// and counted: shared-memory bank conflicts. Not modelled: blocks that wait for each other, the
// order in which other SMs see writes to global memory, time. A fault ends the program with status
// 1 and the place. `sabotage` breaks an instruction, so that tests can show that it is noticed.
#pragma once

#include <utility>
#include <vector>

#include "tests/simt/block.h"
#include "tests/simt/hopper.h"
#include "tests/simt/matrix.h"
#include "tests/simt/memory.h"

namespace simt {

inline void run_thread() {
  Fiber::arrived();
  state.body();
  Thread& t = this_thread();
  t.waiting = Waiting::kDone;
  Block& b = state.block;
  --b.alive;
  for (const Meeting& m : b.warps[t.warp()].meetings) {
    if (m.mask >> t.lane() & 1) fault("a lane ended while its warp waits in ", m.operation);
  }
  if (b.alive > 0 && b.at_barrier == b.alive) release_block();
  for (;;) state.fibers[t.index].leave();
}

inline void run_block(Dim3 index, unsigned threads, size_t shared_bytes) {
  Block& b = state.block;
  b = Block{};
  b.index = index;
  b.threads.resize(threads);
  b.warps.resize((threads + kWarp - 1) / kWarp);
  b.shared.assign(shared_bytes, 0xa5);
  b.shadow.resize(shared_bytes);
  b.alive = threads;
  while (state.fibers.size() < threads) state.fibers.emplace_back();
  for (unsigned i = 0; i < threads; ++i) {
    b.threads[i].index = i;
    b.threads[i].id = Dim3(i % state.block_size.x, i / state.block_size.x % state.block_size.y,
                           i / state.block_size.x / state.block_size.y);
    state.fibers[i].start(run_thread);
  }
  while (b.alive > 0) {
    std::vector<unsigned> ready;
    for (const Thread& t : b.threads) {
      if (t.waiting == Waiting::kNothing) ready.push_back(t.index);
    }
    if (ready.empty() && land_a_box()) continue;
    if (ready.empty()) fault("deadlock: every thread that is left waits for one that is gone");
    // One warp goes as far as it can.
    const unsigned warp = ready[random_bits() % ready.size()] / kWarp;
    const unsigned first_lane = static_cast<unsigned>(random_bits()) % kWarp;
    for (unsigned i = 0; i < kWarp; ++i) {
      const unsigned t = warp * kWarp + (first_lane + i) % kWarp;
      if (t >= threads || b.threads[t].waiting != Waiting::kNothing) continue;
      state.thread = &b.threads[t];
      state.fibers[t].enter();
    }
  }
  for (unsigned w = 0; w < b.warps.size(); ++w) count_conflicts(w);
  if (!b.boxes.empty()) fault("the block has ended before a box of it has landed");
  state.thread = nullptr;
  ++counters.blocks;
}

// Runs kernel(arguments...) on a grid, its blocks one after the other in random order.
template <typename F>
void launch(Dim3 grid, Dim3 block_size, size_t shared_bytes, const F& body) {
  state.grid = grid;
  state.block_size = block_size;
  state.body = body;
  state.random = seed;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > 1024) {
    fault("launch of an impossible grid");
  }
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  for (const uint64_t i : order) {
    run_block(Dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / grid.x / grid.y)),
              threads, shared_bytes);
  }
  state.body = nullptr;
}

}  // namespace simt
