// A block of threads on the emulator: its state, faults, and how threads wait for each other at
// barriers, shuffles and votes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "tests/simt/fiber.h"

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline constexpr int kWarp = 32;
inline constexpr uint32_t kFullMask = 0xffffffffu;

// Instructions that misbehave on purpose.
struct Sabotage {
  int wait_for_fewer_groups = 0;  // cp.async.wait_group N waits as if it said N + this
  int skip_barrier = -1;          // no thread waits at its n-th __syncthreads
  bool skip_warp_barriers = false;
  bool copy_all_bytes = false;      // copies ignore the bounds that they are told, as in tails
  int wait_for_fewer_products = 0;  // wgmma.wait_group N waits as if it said N + this
  bool skip_barrier_waits = false;  // of barriers in shared memory
  bool skip_barrier_fence = false;  // after they are made
};

struct Counters {
  uint64_t barriers = 0, mmas = 0, copies = 0, blocks = 0;
  uint64_t small_mmas = 0;                       // m8n8k16
  uint64_t wgmmas = 0, boxes = 0;                // of a warp, of a block
  uint64_t vector_loads = 0, vector_stores = 0;  // 16 bytes, global
  // Extra passes over the banks, per kind of access.
  uint64_t ldmatrix_conflicts = 0, copy_conflicts = 0, shared_conflicts = 0;
};

inline Sabotage sabotage;
inline Counters counters;
inline uint64_t seed = 1;

struct Copy {
  uint32_t to;
  uint8_t data[16];
};

enum class AccessKind : uint8_t { kLoad, kStore, kCopy };
struct Access {
  AccessKind kind;
  uint8_t bytes;
  uint32_t address;
};

enum class Waiting : uint8_t { kNothing, kWarp, kBlock, kBarrier, kDone };

// An mbarrier in shared memory.
struct Barrier {
  int arrivals, pending;
  int64_t bytes;  // announced and not there
  uint32_t phase;
  unsigned maker;
  uint32_t made_in;  // the epoch of the block
  bool fenced;
};

// A box that TMA copies.
struct Box {
  uint32_t to, barrier;
  std::vector<uint8_t> data;
};

// A warp's part of a product of its warpgroup.
struct Wgmma {
  uint64_t a, b;  // descriptors
  uint32_t first_row;
  int columns;
  bool a_signed;
};

struct Thread {
  unsigned index = 0;
  Dim3 id;
  Waiting waiting = Waiting::kNothing;
  int barriers = 0;
  uint32_t barrier = 0;  // that it waits for
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  std::vector<Access> accesses;  // since the warp's last common operation

  unsigned warp() const { return index / kWarp; }
  unsigned lane() const { return index % kWarp; }
};

// Lanes that have arrived at an operation of the warp.
struct Meeting {
  const char* operation;
  uint32_t mask, arrived = 0;
  void* arguments[kWarp] = {};
};

struct Warp {
  std::vector<Meeting> meetings;
  uint32_t epoch = 1;  // barriers of this warp
  // Products that have not happened yet, and what they add to: the sums of each lane.
  std::vector<Wgmma> open_wgmmas;
  std::vector<std::vector<Wgmma>> wgmmas;  // groups
  std::vector<int32_t> sums[kWarp];
  int32_t* to[kWarp] = {};
  bool fenced = false;

  size_t pending_wgmmas() const { return open_wgmmas.size() + wgmmas.size(); }
};

// Who touched a byte of shared memory last.
inline constexpr uint16_t kEverybody = 0xffff;  // threads that count together
struct Shadow {
  uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
  uint32_t read_warps = 0;
  uint16_t writer = 0, reader = 0;
  bool written = false, in_flight = false;
};

struct Block {
  Dim3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  std::vector<Shadow> shadow;
  std::map<uint32_t, Barrier> barriers;  // by address
  std::vector<Box> boxes;                // on their way
  uint32_t epoch = 1;
  unsigned alive = 0, at_barrier = 0;
};

struct State {
  Dim3 grid, block_size;
  Block block;
  Thread* thread = nullptr;
  std::vector<Fiber> fibers;
  std::function<void()> body;
  uint64_t random = 1;
};
inline State state;

inline Thread& this_thread() { return *state.thread; }
inline Warp& this_warp() { return state.block.warps[this_thread().warp()]; }

template <typename... Parts>
[[noreturn]] inline void fault(const Parts&... parts) {
  std::ostringstream text;
  text << "simt: ";
  (text << ... << parts);
  if (state.thread != nullptr) {
    const Dim3& b = state.block.index;
    text << " (block " << b.x << "," << b.y << "," << b.z << ", thread " << this_thread().index
         << ", seed " << seed << ")";
  }
  std::cerr << text.str() << std::endl;
  std::_Exit(1);
}

inline uint64_t random_bits() {
  uint64_t z = (state.random += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline void wait(Waiting for_what) {
  this_thread().waiting = for_what;
  state.fibers[this_thread().index].leave();
}

inline void count_conflicts(unsigned warp);

inline void release_block() {
  Block& b = state.block;
  b.at_barrier = 0;
  ++b.epoch;
  ++counters.barriers;
  for (unsigned w = 0; w < b.warps.size(); ++w) count_conflicts(w);
  for (Thread& t : b.threads) {
    if (t.waiting == Waiting::kBlock) t.waiting = Waiting::kNothing;
  }
}

inline void sync_threads() {
  if (this_thread().barriers++ == sabotage.skip_barrier) return;
  if (++state.block.at_barrier == state.block.alive) {
    release_block();
  } else {
    wait(Waiting::kBlock);
  }
}

// All lanes of `mask` meet; the last to arrive runs `together` on everybody's arguments.
template <typename Arguments, typename F>
void meet(const char* operation, uint32_t mask, Arguments& arguments, const F& together) {
  const unsigned lane = this_thread().lane(), warp = this_thread().warp();
  if ((mask >> lane & 1) == 0) fault(operation, ": the lane is not in its own mask");
  std::vector<Meeting>& meetings = this_warp().meetings;
  auto meeting = std::find_if(meetings.begin(), meetings.end(),
                              [&](const Meeting& m) { return (m.mask & mask) != 0; });
  if (meeting == meetings.end()) {
    meetings.push_back({operation, mask});
    meeting = meetings.end() - 1;
  }
  if (std::strcmp(meeting->operation, operation) != 0 || meeting->mask != mask) {
    fault("lanes of a warp meet in ", meeting->operation, " and ", operation);
  }
  meeting->arrived |= 1u << lane;
  meeting->arguments[lane] = &arguments;
  if (meeting->arrived != mask) return wait(Waiting::kWarp);
  Arguments* all[kWarp];
  for (int i = 0; i < kWarp; ++i) all[i] = static_cast<Arguments*>(meeting->arguments[i]);
  meetings.erase(meeting);
  count_conflicts(warp);
  together(all);
  for (unsigned i = 0; i < kWarp; ++i) {
    const unsigned t = warp * kWarp + i;
    if ((mask >> i & 1) && t != this_thread().index) {
      state.block.threads[t].waiting = Waiting::kNothing;
    }
  }
}

inline void sync_warp(uint32_t mask = kFullMask) {
  if (sabotage.skip_warp_barriers) return;
  int none = 0;
  meet("__syncwarp", mask, none, [](int**) { ++this_warp().epoch; });
}

template <typename T>
T shuffle_xor(uint32_t mask, T value, int lane_mask) {
  struct Arguments {
    T value, result;
    int from;
  } mine{value, value, static_cast<int>(this_thread().lane()) ^ lane_mask};
  meet("__shfl_xor_sync", mask, mine, [mask](Arguments** all) {
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      if (!(mask >> all[i]->from & 1)) fault("__shfl_xor_sync reads a lane outside of its mask");
      all[i]->result = all[all[i]->from]->value;
    }
  });
  return mine.result;
}

inline uint32_t ballot(uint32_t mask, bool predicate) {
  struct Arguments {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  meet("__ballot_sync", mask, mine, [mask](Arguments** all) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) bits |= uint32_t{all[i]->predicate} << i;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) all[i]->result = bits;
    }
  });
  return mine.result;
}

}  // namespace simt
