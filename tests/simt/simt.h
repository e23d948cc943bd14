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
//   warps           lanes meet in the same operation with the same mask
//   barriers        every thread that is left arrives, or nothing moves on: a deadlock is a fault
//
// and counted: shared-memory bank conflicts. Not modelled: blocks that wait for each other, the
// order in which other SMs see writes to global memory, time. A fault ends the program with status
// 1 and the place. `sabotage` breaks an instruction, so that tests can show that it is noticed.
#pragma once

#if !defined(__x86_64__)
#error "the fibers of the emulator are written for x86-64"
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline constexpr int kWarp = 32;
inline constexpr uint32_t kFullMask = 0xffffffffu;

// ---- what tests can set and read
// -----------------------------------------------------------------

// Instructions that misbehave on purpose.
struct Sabotage {
  int wait_for_fewer_groups = 0;  // cp.async.wait_group N waits as if it said N + this
  int skip_barrier = -1;          // no thread waits at its n-th __syncthreads
  bool skip_warp_barriers = false;
  bool copy_all_bytes = false;  // cp.async ignores its size operand, the predicate of tails
};

struct Counters {
  uint64_t barriers = 0, mmas = 0, copies = 0, blocks = 0;
  uint64_t vector_loads = 0, vector_stores = 0;  // 16 bytes, global
  // Extra passes over the banks, per kind of access.
  uint64_t ldmatrix_conflicts = 0, copy_conflicts = 0, shared_conflicts = 0;
};

inline Sabotage sabotage;
inline Counters counters;
inline uint64_t seed = 1;

// ---- fibers
// --------------------------------------------------------------------------------------

extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline constexpr size_t kStackBytes = 256 << 10;

// The side of a switch that AddressSanitizer wants to know.
struct StackBounds {
  const void* bottom = nullptr;
  size_t bytes = 0;
};

inline void announce_switch([[maybe_unused]] const StackBounds& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, to.bottom, to.bytes);
#endif
}
inline void finish_switch([[maybe_unused]] StackBounds* from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, from ? &from->bottom : nullptr,
                                  from ? &from->bytes : nullptr);
#endif
}

class Fiber {
 public:
  Fiber() : stack_(static_cast<uint8_t*>(std::aligned_alloc(64, kStackBytes))) {}

  // `entry` never returns.
  void start(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack_.get(), kStackBytes);
#endif
    void** top = reinterpret_cast<void**>(stack_.get() + kStackBytes - 64);
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // callee-saved registers
    pointer_ = top;
  }
  // From the scheduler into the fiber, and back.
  void enter() {
    announce_switch({stack_.get(), kStackBytes});
    simt_switch(&scheduler_, pointer_);
    finish_switch(nullptr);
  }
  void leave() {
    announce_switch(scheduler_bounds_);
    simt_switch(&pointer_, scheduler_);
    finish_switch(&scheduler_bounds_);
  }
  static void arrived() { finish_switch(&scheduler_bounds_); }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> stack_;
  void* pointer_ = nullptr;
  inline static void* scheduler_ = nullptr;
  inline static StackBounds scheduler_bounds_;
};

// ---- a block and its threads
// ---------------------------------------------------------------------

struct Copy {
  uint32_t to;
  uint8_t bytes, count;
  uint8_t data[16];
};

enum class AccessKind : uint8_t { kLoad, kStore, kCopy };
struct Access {
  AccessKind kind;
  uint8_t bytes;
  uint32_t address;
};

enum class Waiting : uint8_t { kNothing, kWarp, kBlock, kDone };

struct Thread {
  unsigned index = 0;
  Dim3 id;
  Waiting waiting = Waiting::kNothing;
  int barriers = 0;
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
};

// Who touched a byte of shared memory last.
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

// ---- waiting
// -------------------------------------------------------------------------------------

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

// ---- shared memory
// -------------------------------------------------------------------------------

inline void check_bounds(uint32_t address, uint32_t bytes, const char* what) {
  if (address + uint64_t{bytes} > state.block.shared.size()) {
    fault(what, " of shared memory at ", address, ", ", bytes, " bytes, past its end at ",
          state.block.shared.size());
  }
  if (address % bytes != 0) {
    fault(what, " of shared memory at ", address, " is not aligned to ", bytes);
  }
}

[[noreturn]] inline void race(const char* what, uint32_t address, unsigned other) {
  fault("race: ", what, " of shared byte ", address, " that thread ", other,
        " has touched without a barrier since");
}

inline void shadow_read(const Thread& t, uint32_t address, uint32_t bytes) {
  Block& b = state.block;
  const uint32_t warp_epoch = b.warps[t.warp()].epoch;
  for (uint32_t i = address; i < address + bytes; ++i) {
    Shadow& s = b.shadow[i];
    if (s.in_flight) fault("read of shared byte ", i, " while cp.async may still write it");
    if (!s.written) fault("read of shared byte ", i, ", which was never written");
    const bool same_warp = s.writer / kWarp == t.warp();
    if (s.writer != t.index && s.write_epoch == b.epoch &&
        !(same_warp && s.write_warp_epoch < warp_epoch)) {
      race("read", i, s.writer);
    }
    if (s.read_epoch != b.epoch) s.read_warps = 0;
    s.read_epoch = b.epoch;
    s.read_warps |= 1u << t.warp();
    s.reader = static_cast<uint16_t>(t.index);
    s.read_warp_epoch = warp_epoch;
  }
}

inline void shadow_write(const Thread& t, uint32_t address, uint32_t bytes, bool lands_later) {
  Block& b = state.block;
  const uint32_t warp_epoch = b.warps[t.warp()].epoch;
  for (uint32_t i = address; i < address + bytes; ++i) {
    Shadow& s = b.shadow[i];
    if (s.in_flight) fault("write of shared byte ", i, " while cp.async may still write it");
    if (s.written && s.writer != t.index && s.write_epoch == b.epoch &&
        !(s.writer / kWarp == t.warp() && s.write_warp_epoch < warp_epoch)) {
      race("write", i, s.writer);
    }
    if (s.read_epoch == b.epoch) {
      const bool other_warps = (s.read_warps & ~(1u << t.warp())) != 0;
      const bool other_lane =
          s.reader / kWarp == t.warp() && s.reader != t.index && s.read_warp_epoch == warp_epoch;
      if (other_warps || other_lane) race("write", i, s.reader);
    }
    s.writer = static_cast<uint16_t>(t.index);
    s.write_epoch = b.epoch;
    s.write_warp_epoch = warp_epoch;
    s.written = true;
    s.in_flight = lands_later;
  }
}

// Extra passes that `n` accesses of `bytes` each need: lanes are served in groups that cover 128
// bytes, and in a group a bank gives one word a pass.
inline uint64_t extra_passes(const uint32_t* addresses, int n, uint32_t bytes) {
  const int group = bytes <= 4 ? 32 : static_cast<int>(128 / bytes);
  uint64_t extra = 0;
  for (int first = 0; first < n; first += group) {
    uint32_t words[32][32];
    int count[32] = {}, most = 1;
    for (int i = first; i < std::min(n, first + group); ++i) {
      for (uint32_t word = addresses[i] / 4; word <= (addresses[i] + bytes - 1) / 4; ++word) {
        const uint32_t bank = word % 32;
        if (std::find(words[bank], words[bank] + count[bank], word) != words[bank] + count[bank]) {
          continue;
        }
        words[bank][count[bank]++] = word;
        most = std::max(most, count[bank]);
      }
    }
    extra += static_cast<uint64_t>(most - 1);
  }
  return extra;
}

// Looks at the accesses of a warp's lanes since they last met, as if the n-th of each lane went
// together.
inline void count_conflicts(unsigned warp) {
  Thread* lanes = &state.block.threads[warp * kWarp];
  const unsigned n =
      std::min<unsigned>(kWarp, static_cast<unsigned>(state.block.threads.size()) - warp * kWarp);
  size_t longest = 0;
  for (unsigned l = 0; l < n; ++l) longest = std::max(longest, lanes[l].accesses.size());
  for (size_t i = 0; i < longest; ++i) {
    uint32_t addresses[kWarp];
    int used = 0;
    const Access* like = nullptr;
    for (unsigned l = 0; l < n; ++l) {
      if (i >= lanes[l].accesses.size()) continue;
      const Access& a = lanes[l].accesses[i];
      if (like == nullptr) like = &a;
      if (a.kind == like->kind && a.bytes == like->bytes) addresses[used++] = a.address;
    }
    const uint64_t extra = extra_passes(addresses, used, like->bytes);
    (like->kind == AccessKind::kCopy ? counters.copy_conflicts : counters.shared_conflicts) +=
        extra;
  }
  for (unsigned l = 0; l < n; ++l) lanes[l].accesses.clear();
}

template <typename T>
T shared_load(uint32_t address) {
  check_bounds(address, sizeof(T), "read");
  shadow_read(this_thread(), address, sizeof(T));
  this_thread().accesses.push_back({AccessKind::kLoad, sizeof(T), address});
  T value;
  std::memcpy(&value, &state.block.shared[address], sizeof(T));
  return value;
}

template <typename T>
void shared_store(uint32_t address, const T& value) {
  check_bounds(address, sizeof(T), "write");
  shadow_write(this_thread(), address, sizeof(T), false);
  this_thread().accesses.push_back({AccessKind::kStore, sizeof(T), address});
  std::memcpy(&state.block.shared[address], &value, sizeof(T));
}

// ---- cp.async
// ------------------------------------------------------------------------------------

// `count` of `bytes` (4 or 16) are copied, the rest is zero.
inline void copy_async(uint32_t to, const void* from, int bytes, int count) {
  if (reinterpret_cast<uintptr_t>(from) % static_cast<unsigned>(bytes) != 0) {
    fault("cp.async of ", bytes, " bytes from a misaligned address");
  }
  if (sabotage.copy_all_bytes) count = bytes;
  check_bounds(to, static_cast<uint32_t>(bytes), "cp.async");
  shadow_write(this_thread(), to, static_cast<uint32_t>(bytes), true);
  this_thread().accesses.push_back({AccessKind::kCopy, static_cast<uint8_t>(bytes), to});
  Copy copy{to, static_cast<uint8_t>(bytes), static_cast<uint8_t>(count), {}};
  for (int i = 0; i < count; ++i) copy.data[i] = static_cast<const uint8_t*>(from)[i];
  std::memset(&state.block.shared[to], 0xa5, static_cast<size_t>(bytes));
  this_thread().open.push_back(copy);
  ++counters.copies;
}

inline void commit_copies() {
  this_thread().groups.push_back(std::move(this_thread().open));
  this_thread().open.clear();
}

// All but the last `pending` groups of this thread land.
inline void wait_copies(int pending) {
  Thread& t = this_thread();
  const size_t keep = static_cast<size_t>(pending + sabotage.wait_for_fewer_groups);
  while (t.groups.size() > keep) {
    for (const Copy& copy : t.groups.front()) {
      for (int i = 0; i < copy.bytes; ++i) {
        Shadow& s = state.block.shadow[copy.to + static_cast<uint32_t>(i)];
        s.in_flight = false;
        s.write_epoch = state.block.epoch;  // others see it after the next barrier
        s.write_warp_epoch = this_warp().epoch;
      }
      std::memcpy(&state.block.shared[copy.to], copy.data, copy.bytes);
    }
    t.groups.erase(t.groups.begin());
  }
}

// ---- matrix instructions
// -------------------------------------------------------------------------

// ldmatrix .m8n8.x4 .b16: matrix j is the 8 rows whose addresses lanes 8j..8j+7 give.
inline void ldmatrix_x4(uint32_t (&result)[4], uint32_t address) {
  struct Arguments {
    uint32_t address;
    uint32_t* result;
  } mine{address, result};
  meet("ldmatrix", kFullMask, mine, [](Arguments** all) {
    const unsigned first = this_thread().warp() * kWarp;
    uint32_t addresses[kWarp];
    for (int l = 0; l < kWarp; ++l) {
      addresses[l] = all[l]->address;
      check_bounds(addresses[l], 16, "ldmatrix");
      shadow_read(state.block.threads[first + static_cast<unsigned>(l)], addresses[l], 16);
    }
    for (int l = 0; l < kWarp; ++l) {
      for (int j = 0; j < 4; ++j) {
        const uint32_t at = addresses[j * 8 + l / 4] + static_cast<uint32_t>(l % 4) * 4;
        std::memcpy(&all[l]->result[j], &state.block.shared[at], 4);
      }
    }
    counters.ldmatrix_conflicts += extra_passes(addresses, kWarp, 16);
  });
}

// mma.m16n8k32.row.col with s32 sums; A is u8 or s8, B is s8. Sums wrap.
template <bool kASigned>
void mma_m16n8k32(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Arguments {
    int32_t* sums;
    const uint32_t* a;
    const uint32_t* b;
  } mine{sums, a, b};
  meet("mma", kFullMask, mine, [](Arguments** all) {
    uint8_t rows[16][32];
    int8_t columns[8][32];
    for (int l = 0; l < kWarp; ++l) {
      const int group = l / 4, at = l % 4 * 4;
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&rows[group + i % 2 * 8][at + i / 2 * 16], &all[l]->a[i], 4);
      }
      for (int i = 0; i < 2; ++i) std::memcpy(&columns[group][at + i * 16], &all[l]->b[i], 4);
    }
    for (int l = 0; l < kWarp; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        int32_t dot = 0;
        for (int k = 0; k < 32; ++k) {
          const int32_t value = kASigned ? static_cast<int8_t>(rows[row][k]) : rows[row][k];
          dot += value * columns[column][k];
        }
        all[l]->sums[i] = static_cast<int32_t>(static_cast<uint32_t>(all[l]->sums[i]) +
                                               static_cast<uint32_t>(dot));
      }
    }
    ++counters.mmas;
  });
}

// ---- global memory
// -------------------------------------------------------------------------------

template <typename T>
T global_load(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) {
    fault("misaligned load of ", sizeof(T), " bytes");
  }
  if (sizeof(T) == 16) ++counters.vector_loads;
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
void global_store(void* to, const T& value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) {
    fault("misaligned store of ", sizeof(T), " bytes");
  }
  if (sizeof(T) == 16) ++counters.vector_stores;
  std::memcpy(to, &value, sizeof(T));
}

template <typename T>
T atomic_add(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

// ---- launching
// -----------------------------------------------------------------------------------

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
  if (blocks == 0 || threads == 0 || threads > 1024) fault("launch of an impossible grid");
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
