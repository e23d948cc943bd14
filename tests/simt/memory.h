// Shared and global memory of the emulator: bounds, alignment, races, bank conflicts, cp.async.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "tests/simt/block.h"

namespace simt {

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

// Adds one to a word, as a whole: threads that count there do not race with one another, but with
// every other access.
inline void shared_count(uint32_t address) {
  check_bounds(address, 4, "count");
  Block& b = state.block;
  for (uint32_t i = address; i < address + 4; ++i) {
    Shadow& s = b.shadow[i];
    if (s.in_flight) fault("count at shared byte ", i, " while cp.async may still write it");
    if (!s.written) fault("count at shared byte ", i, ", which was never written");
    if (s.writer != kEverybody && s.writer != this_thread().index && s.write_epoch == b.epoch) {
      race("count", i, s.writer);
    }
    if (s.read_epoch == b.epoch) race("count", i, s.reader);
    s.writer = kEverybody;
    s.write_epoch = b.epoch;
  }
  uint32_t value;
  std::memcpy(&value, &b.shared[address], 4);
  ++value;
  std::memcpy(&b.shared[address], &value, 4);
}

// `count` of 16 bytes are copied, the rest is zero.
inline void copy_async(uint32_t to, const void* from, int count) {
  constexpr uint32_t kBytes = 16;
  if (reinterpret_cast<uintptr_t>(from) % kBytes != 0) fault("cp.async from a misaligned address");
  if (sabotage.copy_all_bytes) count = kBytes;
  check_bounds(to, kBytes, "cp.async");
  shadow_write(this_thread(), to, kBytes, true);
  this_thread().accesses.push_back({AccessKind::kCopy, kBytes, to});
  Copy copy{to, {}};
  for (int i = 0; i < count; ++i) copy.data[i] = static_cast<const uint8_t*>(from)[i];
  std::memset(&state.block.shared[to], 0xa5, kBytes);
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
      for (size_t i = 0; i < sizeof copy.data; ++i) {
        Shadow& s = state.block.shadow[copy.to + static_cast<uint32_t>(i)];
        s.in_flight = false;
        s.write_epoch = state.block.epoch;  // others see it after the next barrier
        s.write_warp_epoch = this_warp().epoch;
      }
      std::memcpy(&state.block.shared[copy.to], copy.data, sizeof copy.data);
    }
    t.groups.erase(t.groups.begin());
  }
}

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

}  // namespace simt
