#include "csrc/histogram/histogram.h"

#include <cstring>

#include "csrc/base/float_types.h"

namespace qk {
namespace {

constexpr int64_t kLeastOfATask = 65536, kMostTasks = 64;

int64_t tasks_of(int64_t n) {
  const int64_t tasks = (n + kLeastOfATask - 1) / kLeastOfATask;
  return tasks < 1 ? 1 : tasks > kMostTasks ? kMostTasks : tasks;
}

template <typename T>
void count(const T* x, int64_t n, const HistogramRange& range, int64_t bins, int64_t* counts) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bin = histogram_bin(range, bins, to_float(x[i]));
    if (bin >= 0) ++counts[bin];
  }
}

}  // namespace

// [tasks][bins] counts, then [bins] floats.
int64_t histogram_workspace(int64_t n, int64_t bins) {
  return tasks_of(n) * bins * int64_t{sizeof(int64_t)} + bins * int64_t{sizeof(float)};
}

void observe_histogram(const HistogramArgs& args, const Parallel& parallel) {
  const HistogramRange batch{args.batch_low, args.batch_high}, old{*args.low, *args.high};
  if (!is_finite_range(batch)) return;
  const HistogramRange now = wider(old, batch);
  const int64_t tasks = tasks_of(args.n), share = (args.n + tasks - 1) / tasks, bins = args.bins;
  auto* counts = static_cast<int64_t*>(args.workspace);
  auto* next = reinterpret_cast<float*>(counts + tasks * bins);
  parallel.for_each_range(tasks, args.n * 3, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t* mine = counts + task * bins;
      std::memset(mine, 0, static_cast<size_t>(bins) * sizeof(int64_t));
      const int64_t first = task * share, left = args.n - first;
      with_float_type(args.type, [&](auto zero) {
        count(static_cast<const decltype(zero)*>(args.x) + first, left < share ? left : share, now,
              bins, mine);
      });
    }
  });
  for (int64_t j = 0; j < bins; ++j) {
    int64_t total = 0;
    for (int64_t task = 0; task < tasks; ++task) total += counts[task * bins + j];
    next[j] = static_cast<float>(total) + moved_mass(args.histogram, old, now, bins, j);
  }
  std::memcpy(args.histogram, next, static_cast<size_t>(bins) * sizeof(float));
  *args.low = now.low;
  *args.high = now.high;
}

}  // namespace qk
