// Hopper on the emulator: barriers in shared memory, boxes copied by TMA, wgmma.
//
//   barriers   a thread that waits sleeps until the phase has ended; if nobody is left who could
//              end it, that is a deadlock
//   boxes      land as late as they may: when no thread can go on. Until then their target holds
//              poison and any access to it is a fault
//   wgmma      reads shared memory, and writes its sums, as late as it may: at the wait that forces
//              it. Until then the sums are poison, so that reading them early gives wrong numbers
//
// What is known of the hardware (the swizzle, descriptors, who holds which sum) is written down
// here from the PTX manual: no GPU has confirmed it.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tests/simt/memory.h"

namespace simt {

// A matrix of bytes, cut into boxes of 128 bytes by `box_rows`.
struct TensorMap {
  const uint8_t* matrix = nullptr;
  int64_t depth = 0, rows = 0, row_bytes = 0;
  int box_rows = 0;
};

// False where the driver would refuse.
inline bool encode_tensor_map(TensorMap* map, const void* matrix, int64_t depth, int64_t rows,
                              int64_t row_bytes, int box_rows) {
  *map = {static_cast<const uint8_t*>(matrix), depth, rows, row_bytes, box_rows};
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && row_bytes % 16 == 0 && row_bytes >= 0 &&
         row_bytes < int64_t{1} << 40 && depth >= 1 && depth <= int64_t{1} << 32 && rows >= 1 &&
         rows <= int64_t{1} << 32 && box_rows >= 1 && box_rows <= 256;
}

// ---- barriers ----

inline Barrier& barrier_at(uint32_t address, const char* what) {
  const auto found = state.block.barriers.find(address);
  if (found == state.block.barriers.end()) fault(what, ": no barrier at ", address);
  Barrier& barrier = found->second;
  if (barrier.maker != this_thread().index && barrier.made_in == state.block.epoch) {
    fault(what, ": the barrier at ", address, " was made by thread ", barrier.maker,
          " without a __syncthreads since");
  }
  return barrier;
}

inline void barrier_init(uint32_t address, int arrivals) {
  check_bounds(address, 8, "mbarrier.init");
  shadow_write(this_thread(), address, 8, false);
  state.block.barriers[address] = {arrivals,          arrivals, 0, 0, this_thread().index,
                                   state.block.epoch, false};
}

inline void barrier_init_done() {
  if (sabotage.skip_barrier_fence) return;
  for (auto& [address, barrier] : state.block.barriers) barrier.fenced = true;
}

// Ends the phase if nothing is awaited, and wakes who waits.
inline void barrier_check(uint32_t address, Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  for (Thread& t : state.block.threads) {
    if (t.waiting == Waiting::kBarrier && t.barrier == address) t.waiting = Waiting::kNothing;
  }
}

inline void barrier_arrive(uint32_t address, uint32_t bytes) {
  Barrier& barrier = barrier_at(address, "mbarrier.arrive");
  if (barrier.pending == 0) fault("mbarrier.arrive: more arrivals than the barrier has");
  barrier.bytes += bytes;
  --barrier.pending;
  barrier_check(address, barrier);
}

inline void barrier_wait(uint32_t address, uint32_t parity) {
  if (sabotage.skip_barrier_waits) return;
  for (;;) {
    const Barrier& barrier = barrier_at(address, "mbarrier.try_wait");
    if (barrier.phase % 2 != parity) break;
    this_thread().barrier = address;
    wait(Waiting::kBarrier);
  }
}

// ---- boxes ----

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void start_box(uint32_t to, const TensorMap& map, int32_t column, int32_t row,
                      uint32_t address) {
  const auto bytes = static_cast<uint32_t>(map.box_rows) * 128;
  if (to % 1024 != 0) fault("a swizzled box goes to a multiple of 1024, got ", to);
  check_bounds(to, 128, "a box");
  check_bounds(to + bytes - 128, 128, "a box");
  if (!barrier_at(address, "a box").fenced) {
    fault("a box signals a barrier that was made without fence.mbarrier_init");
  }
  shadow_write(this_thread(), to, bytes, true);
  Box box{to, address, std::vector<uint8_t>(bytes)};
  for (int64_t r = 0; r < map.box_rows; ++r) {
    for (int64_t c = 0; c < 128; ++c) {
      const bool inside = row + r >= 0 && row + r < map.rows && column + c >= 0 &&
                          (column + c < map.depth || sabotage.copy_all_bytes);
      if (inside) {
        box.data[swizzled(static_cast<uint32_t>(r * 128 + c))] =
            map.matrix[(row + r) * map.row_bytes + column + c];
      }
    }
  }
  std::memset(&state.block.shared[to], 0xa5, bytes);
  state.block.boxes.push_back(std::move(box));
  ++counters.boxes;
}

// One of the boxes that are on their way, drawn at random. False: there is none.
inline bool land_a_box() {
  std::vector<Box>& boxes = state.block.boxes;
  if (boxes.empty()) return false;
  const size_t which = random_bits() % boxes.size();
  const Box box = std::move(boxes[which]);
  boxes.erase(boxes.begin() + static_cast<int64_t>(which));
  std::memcpy(&state.block.shared[box.to], box.data.data(), box.data.size());
  for (uint32_t i = 0; i < box.data.size(); ++i) {
    Shadow& s = state.block.shadow[box.to + i];
    s.in_flight = false;
    s.write_epoch = 0;  // whoever has waited for the barrier sees it
  }
  Barrier& barrier = state.block.barriers.at(box.barrier);
  barrier.bytes -= static_cast<int64_t>(box.data.size());
  barrier_check(box.barrier, barrier);
  return true;
}

// ---- wgmma ----

inline void wgmma_fence() {
  int none = 0;
  meet("wgmma.fence", kFullMask, none, [](int**) { this_warp().fenced = true; });
}

// Row `row` of a matrix that a descriptor describes: 32 bytes of it.
inline void read_row(uint64_t descriptor, uint32_t row, uint8_t (&bytes)[32]) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fault("wgmma: the descriptor is not of the 128-byte swizzle");
  if ((descriptor >> 49 & 7) != 0) fault("wgmma: the base of a descriptor must be 0");
  for (uint32_t k = 0; k < 32; k += 16) {
    const uint32_t at = swizzled(start + row / 8 * stride + row % 8 * 128 + k);
    check_bounds(at, 16, "wgmma");
    for (uint32_t i = at; i < at + 16; ++i) {
      const Shadow& s = state.block.shadow[i];
      if (s.in_flight) fault("wgmma reads shared byte ", i, " while a box may still write it");
      if (!s.written) fault("wgmma reads shared byte ", i, ", which was never written");
    }
    std::memcpy(bytes + k, &state.block.shared[at], 16);
  }
}

inline void run_wgmma(const Wgmma& op) {
  uint8_t a[16][32];
  std::vector<std::array<uint8_t, 32>> b(static_cast<size_t>(op.columns));
  for (uint32_t r = 0; r < 16; ++r) read_row(op.a, op.first_row + r, a[r]);
  for (uint32_t n = 0; n < b.size(); ++n) {
    uint8_t bytes[32];
    read_row(op.b, n, bytes);
    std::memcpy(b[n].data(), bytes, 32);
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < op.columns / 2; ++i) {
      const int row = l / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
      int32_t dot = 0;
      for (int k = 0; k < 32; ++k) {
        const int32_t value = op.a_signed ? static_cast<int8_t>(a[row][k]) : a[row][k];
        dot += value * static_cast<int8_t>(b[static_cast<size_t>(column)][static_cast<size_t>(k)]);
      }
      int32_t& sum = this_warp().sums[static_cast<size_t>(l)][static_cast<size_t>(i)];
      sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(dot));
    }
  }
  ++counters.wgmmas;
}

// This warp's part of a product of its warpgroup: 16 rows of A, `columns` rows of B, both with K
// contiguous; `sums` has columns / 2 elements a lane.
template <bool kASigned>
void wgmma(int32_t* sums, int columns, uint64_t a, uint64_t b) {
  struct Arguments {
    int32_t* sums;
    uint64_t a, b;
  } mine{sums, a, b};
  meet("wgmma", kFullMask, mine, [columns](Arguments** all) {
    Warp& warp = this_warp();
    if (!warp.fenced) fault("wgmma without a wgmma.fence before it");
    for (int l = 0; l < kWarp; ++l) {
      if (all[l]->a != all[0]->a || all[l]->b != all[0]->b) {
        fault("wgmma: lanes of a warp give different descriptors");
      }
    }
    const size_t size = static_cast<size_t>(columns) / 2;
    for (size_t l = 0; l < kWarp; ++l) {
      if (warp.pending_wgmmas() == 0) {
        warp.sums[l].assign(all[l]->sums, all[l]->sums + size);
        warp.to[l] = all[l]->sums;
      }
      if (warp.to[l] != all[l]->sums) fault("wgmma: other sums while products are on their way");
      std::memset(all[l]->sums, 0xa5, size * 4);
    }
    warp.open_wgmmas.push_back(
        {all[0]->a, all[0]->b, this_thread().warp() % 4 * 16, columns, kASigned});
  });
}

inline void wgmma_commit() {
  int none = 0;
  meet("wgmma.commit_group", kFullMask, none, [](int**) {
    this_warp().wgmmas.push_back(std::move(this_warp().open_wgmmas));
    this_warp().open_wgmmas.clear();
  });
}

inline void wgmma_wait(int pending) {
  int none = 0;
  meet("wgmma.wait_group", kFullMask, none, [pending](int**) {
    Warp& warp = this_warp();
    const auto keep = static_cast<size_t>(pending + sabotage.wait_for_fewer_products);
    while (warp.wgmmas.size() > keep) {
      for (const Wgmma& op : warp.wgmmas.front()) run_wgmma(op);
      warp.wgmmas.erase(warp.wgmmas.begin());
    }
    warp.fenced = false;
    if (warp.pending_wgmmas() > 0) return;
    for (size_t l = 0; l < kWarp; ++l) {
      if (!warp.sums[l].empty())
        std::memcpy(warp.to[l], warp.sums[l].data(), warp.sums[l].size() * 4);
      warp.sums[l].clear();
    }
  });
}

}  // namespace simt
