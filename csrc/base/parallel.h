// How a kernel runs a range on several threads. The caller owns the threads and passes them as a
// value; csrc starts none. Results never depend on the number of threads.
#pragma once

#include <cstdint>

namespace qk {

struct Parallel {
  using Body = void (*)(void* context, int64_t begin, int64_t end);

  int threads = 1;
  // Below this much work one thread is faster, in nanoseconds: a fork and join of a sleeping pool
  // costs tens of microseconds. A Team (team.h) has less.
  int64_t fork_ns = 20'000;
  // Calls body on disjoint sub-ranges that cover [0, tasks); returns when all are done. A body does
  // not call it again.
  void (*run)(const Parallel& self, int64_t tasks, Body body, void* context) = nullptr;

  // Splits [0, tasks) over the threads if `work_ns` (an estimate for all tasks, in nanoseconds)
  // pays for the fork.
  template <typename F>
  void for_each_range(int64_t tasks, int64_t work_ns, const F& f) const {
    if (tasks <= 0) return;
    if (threads <= 1 || run == nullptr || tasks == 1 || work_ns < fork_ns) {
      f(int64_t{0}, tasks);
      return;
    }
    run(
        *this, tasks,
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<const F*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};

inline constexpr Parallel kSerial{};

}  // namespace qk
