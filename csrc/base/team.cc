#include "csrc/base/team.h"

namespace qk {
namespace {

constexpr uint32_t kPartBits = 8, kFinished = ~uint32_t{0}, kLastRound = (1u << 24) - 2;
constexpr int kSpins = 4000;  // about a tenth of a millisecond

// Waits until `word` is not `old`: first awake, then asleep. Returns the new value.
uint32_t wait_for_change(const std::atomic<uint32_t>& word, uint32_t old) {
  uint32_t value = word.load(std::memory_order_acquire);
  for (int spins = 0; value == old; value = word.load(std::memory_order_acquire)) {
    if (++spins > kSpins) {
      word.wait(old, std::memory_order_acquire);
      continue;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
  return value;
}

void set(std::atomic<uint32_t>* word, uint32_t value) {
  word->store(value, std::memory_order_release);
  word->notify_all();
}

}  // namespace

Team::Team(const Parallel& parallel, Lead lead, const void* context)
    : lead_(lead), lead_context_(context) {
  threads = parallel.threads;
  fork_ns = kTeamForkNs;
  run = [](const Parallel& self, int64_t tasks, Body body, void* context) {
    // A Team is only ever passed as itself.
    const_cast<Team&>(static_cast<const Team&>(self)).share(tasks, body, context);
  };
}

void Team::gather(const Parallel& parallel, Lead lead, const void* context) {
  Team team(parallel, lead, context);
  parallel.run(
      parallel, parallel.threads,
      [](void* self, int64_t begin, int64_t end) {
        for (; begin < end; ++begin) static_cast<Team*>(self)->arrive();
      },
      &team);
}

void Team::arrive() {
  const int64_t member = arrived_.fetch_add(1, std::memory_order_relaxed);
  if (member > 0) return follow(member);
  lead_(lead_context_, *this);
  set(&call_, kFinished);
}

void Team::follow(int64_t member) {
  for (uint32_t call = 0;;) {
    call = wait_for_change(call_, call);
    if (call == kFinished) return;
    const uint32_t round = call >> kPartBits, parts = call & ((1u << kPartBits) - 1);
    if (static_cast<uint32_t>(member) >= parts || !take(member, round)) continue;
    run_part(member);
    set(&members_[member].done, round);
  }
}

// A part is taken once. The leader starts a round when all parts of the one before are taken and
// done, so that whoever takes one may read the round's fields.
bool Team::take(int64_t member, uint32_t round) {
  uint32_t before = members_[member].taken.load(std::memory_order_relaxed);
  return before < round &&
         members_[member].taken.compare_exchange_strong(before, round, std::memory_order_acq_rel);
}

void Team::run_part(int64_t member) const {
  const int64_t begin = tasks_ * member / parts_, end = tasks_ * (member + 1) / parts_;
  if (begin < end) body_(context_, begin, end);
}

void Team::share(int64_t tasks, Body body, void* context) {
  if (round_ == kLastRound) return body(context, 0, tasks);
  tasks_ = tasks;
  parts_ = tasks < threads ? tasks : threads;
  body_ = body;
  context_ = context;
  ++round_;
  set(&call_, round_ << kPartBits | static_cast<uint32_t>(parts_));
  run_part(0);
  for (int64_t member = parts_ - 1; member > 0; --member) {
    if (!take(member, round_)) continue;
    run_part(member);
    members_[member].done.store(round_, std::memory_order_relaxed);
  }
  for (int64_t member = 1; member < parts_; ++member) {
    const std::atomic<uint32_t>& done = members_[member].done;
    for (uint32_t round = done.load(std::memory_order_acquire); round != round_;) {
      round = wait_for_change(done, round);
    }
  }
}

}  // namespace qk
