// One fork for many ranges: threads that are kept together while one of them runs a list of small
// operations, so that sharing out the next range costs a cache line instead of a fork.
//
//   with_team(parallel, [&](const Parallel& team) { ...operations, each with `team`... });
//
// Threads: those of `parallel`, no others. The first to arrive leads; the others wait, first awake,
//   after a tenth of a millisecond asleep, and take their part of each range that the leader
//   shares out. A part that its thread has not begun when the leader is through with its own the
//   leader takes over: threads that come late, or one after the other, or never make it slower but
//   cannot stop it.
// Memory: on the stack.
// Numbers: the parts of a range depend on `threads` only, as everywhere; results on nothing.
#pragma once

#include <atomic>
#include <cstdint>

#include "csrc/base/parallel.h"

namespace qk {

class Team : public Parallel {
 public:
  static constexpr int kMostThreads = 128;  // more share out each range by a fork
  // A part comes back after a cache line has gone back and forth; estimates of work are generous.
  static constexpr int64_t kTeamForkNs = 2'000;

  using Lead = void (*)(const void* context, const Parallel& team);
  static void gather(const Parallel& parallel, Lead lead, const void* context);

 private:
  // What one thread writes and the leader reads: the last round whose part is taken, and done.
  struct alignas(64) Member {
    std::atomic<uint32_t> taken{0}, done{0};
  };

  Team(const Parallel& parallel, Lead lead, const void* context);
  void arrive();
  void follow(int64_t member);
  void share(int64_t tasks, Body body, void* context);
  void run_part(int64_t member) const;
  bool take(int64_t member, uint32_t round);

  const Lead lead_;
  const void* const lead_context_;
  std::atomic<int64_t> arrived_{0};
  // Round and number of parts of the range at hand, which the fields after it describe.
  alignas(64) std::atomic<uint32_t> call_{0};
  uint32_t round_ = 0;
  int64_t tasks_ = 0, parts_ = 1;
  Body body_ = nullptr;
  void* context_ = nullptr;
  Member members_[kMostThreads];
};

// Calls lead(team) once.
template <typename F>
void with_team(const Parallel& parallel, const F& lead) {
  if (parallel.threads <= 1 || parallel.run == nullptr || parallel.threads > Team::kMostThreads) {
    lead(parallel);
    return;
  }
  Team::gather(
      parallel, [](const void* f, const Parallel& team) { (*static_cast<const F*>(f))(team); },
      &lead);
}

}  // namespace qk
