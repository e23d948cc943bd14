// A team: every part of every range runs once, whether its threads come at once, late, one after
// the other or in too great a number, and nobody waits for a thread that does not come.
#include "csrc/base/team.h"

#include <atomic>
#include <chrono>
#include <vector>

#include "tests/csrc/check.h"

using namespace qk;
using namespace qk::test;

namespace {

// The sub-ranges one after the other, on the caller's thread.
Parallel in_turn(int count) {
  Parallel parallel;
  parallel.threads = count;
  parallel.run = [](const Parallel& self, int64_t tasks, Parallel::Body body, void* context) {
    for (int64_t t = self.threads; t-- > 0;) {
      const int64_t begin = tasks * t / self.threads, end = tasks * (t + 1) / self.threads;
      if (begin < end) body(context, begin, end);
    }
  };
  return parallel;
}

// As test::threads, but all except one start late.
Parallel late(int count) {
  Parallel parallel;
  parallel.threads = count;
  parallel.run = [](const Parallel& self, int64_t tasks, Parallel::Body body, void* context) {
    std::vector<std::thread> workers;
    for (int64_t t = 1; t < self.threads; ++t) {
      const int64_t begin = tasks * t / self.threads, end = tasks * (t + 1) / self.threads;
      workers.emplace_back([=] {
        std::this_thread::sleep_for(std::chrono::microseconds(300 * t));
        if (begin < end) body(context, begin, end);
      });
    }
    body(context, 0, tasks / self.threads);
    for (std::thread& worker : workers) worker.join();
  };
  return parallel;
}

// Ranges of different lengths, each dependent on the one before.
void every_part_runs_once(const Parallel& parallel, int rounds) {
  constexpr int64_t kMost = 97;
  std::vector<int64_t> seen(kMost, 0);
  int64_t leads = 0;
  with_team(parallel, [&](const Parallel& team) {
    ++leads;
    CHECK(team.threads == parallel.threads);
    for (int round = 1; round <= rounds; ++round) {
      const int64_t tasks = round % kMost + 1;
      team.for_each_range(tasks, INT64_MAX, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++seen[i];
      });
      for (int64_t i = 0; i < tasks; ++i) {
        CHECK(seen[i] == 1, "round ", round, " task ", i, " of ", tasks, ": ", seen[i]);
        seen[i] = 0;
      }
    }
  });
  CHECK(leads == 1, leads);
}

void little_work_stays_with_the_leader() {
  with_team(threads(4), [&](const Parallel& team) {
    const auto leader = std::this_thread::get_id();
    team.for_each_range(100, 10, [&](int64_t begin, int64_t end) {
      CHECK(begin == 0 && end == 100 && std::this_thread::get_id() == leader);
    });
  });
}

// Both threads have to be there at the same time.
void parts_run_side_by_side() {
  std::atomic<int> met{0};
  with_team(threads(2), [&](const Parallel& team) {
    // The second thread may come late for the first ranges.
    for (int round = 0; round < 1000 && met.load() < 2; ++round) {
      met = 0;
      team.for_each_range(2, INT64_MAX, [&](int64_t begin, int64_t end) {
        if (end - begin != 1) return;
        ++met;
        for (int wait = 0; wait < 1000 && met.load() < 2; ++wait) std::this_thread::yield();
      });
    }
  });
  CHECK(met.load() == 2);
}

}  // namespace

int main() {
  for (const int count : {1, 2, 3, 8, 64, 128, 200}) {
    CONTEXT("threads ", count);
    every_part_runs_once(threads(count), 500);
    every_part_runs_once(in_turn(count), 500);
  }
  for (const int count : {2, 5}) {
    CONTEXT("late threads ", count);
    for (const int rounds : {1, 300, 3000}) every_part_runs_once(late(count), rounds);
  }
  little_work_stays_with_the_leader();
  parts_run_side_by_side();
  return 0;
}
