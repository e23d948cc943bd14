// Which operations run on slices of the batch, and how large a slice is.
//
// An operation can run on a slice if every image of its result depends on the same image of its
// operands only: all of them have the batch as outermost dimension, and in the buffers that the
// plan itself fills, image b of every view lies inside image b of the buffer. The choice is the
// cheapest path through the operations, in bytes that come from beyond the cache: activations as
// far as they do not fit, weights once a slice, and what is written before and read after a change
// of the slice.
#include <algorithm>
#include <cstdint>

#include "csrc/base/integers.h"
#include "csrc/plan/operations.h"
#include "csrc/plan/placement.h"

namespace qk::plan {
namespace {

class Chooser {
 public:
  Chooser(const Program& program, const Draft& draft, int64_t batch, int64_t cache, int threads)
      : program_(program),
        draft_(draft),
        batch_(batch),
        cache_(static_cast<double>(cache)),
        threads_(threads),
        count_(static_cast<int>(program.operations.size())) {
    slices_.push_back(1);
    for (int64_t k = threads > 1 ? threads : 2; k <= batch; k *= 2) slices_.push_back(k);
    if (batch > slices_.back() && threads == 1) slices_.push_back(batch);
  }

  std::vector<Slicing> run() {
    std::vector<double> cost(slices_.size(), 0.0);
    std::vector<std::vector<int>> from(static_cast<size_t>(count_));
    for (int i = 0; i < count_; ++i) {
      const bool can = sliceable(i);
      const double change = crossing(i);
      std::vector<double> next(slices_.size(), kNever);
      from[i].assign(slices_.size(), 0);
      for (size_t k = 0; k < slices_.size(); ++k) {
        if (k > 0 && !can) continue;
        for (size_t before = 0; before < slices_.size(); ++before) {
          const double c = cost[before] + (before == k ? 0.0 : change);
          if (c >= next[k]) continue;
          next[k] = c;
          from[i][k] = static_cast<int>(before);
        }
        next[k] += cost_of(i, slices_[k]);
      }
      cost = next;
    }
    return slicings(from, std::min_element(cost.begin(), cost.end()) - cost.begin());
  }

 private:
  static constexpr double kNever = 1e300;
  // What could be read while threads meet after an operation that they share; slices need not meet.
  static constexpr double kForkBytes = 150e3;

  std::vector<Slicing> slicings(const std::vector<std::vector<int>>& from, int64_t chosen) const {
    std::vector<Slicing> found;
    for (int i = count_ - 1; i >= 0; --i) {
      const int64_t slices = slices_[chosen], images = ceil_div(batch_, slices);
      if (slices > 1) {
        if (!found.empty() && found.back().begin == i + 1 && found.back().images == images) {
          found.back().begin = i;
        } else {
          found.push_back({i, i + 1, batch_, images, threads_, {}});
        }
      }
      chosen = from[i][chosen];
    }
    std::reverse(found.begin(), found.end());
    return found;
  }

  // ---- what can be sliced

  // Image b of the view lies inside image b of its buffer.
  bool image_by_image(const View& view) const {
    const Buffer& buffer = draft_.buffers[view.buffer];
    if (view.rank() == 0 || view.size[0] != batch_) return false;
    if (buffer.home == Home::kInput || buffer.home == Home::kConstant) return true;
    if (buffer.bytes % batch_ != 0) return false;
    const int64_t element = dtype_bytes(view.dtype), image = buffer.bytes / batch_;
    int64_t last = view.offset + element;
    for (int d = 1; d < view.rank(); ++d) last += (view.size[d] - 1) * view.stride[d] * element;
    return view.stride[0] * element == image && last <= image;
  }

  bool sliceable(int i) const {
    Operation copy = program_.operations[i];
    if (!take_images(batch_, 1, &copy)) return false;
    for (const View& view : draft_.views[i]) {
      if (!image_by_image(view)) return false;
    }
    return true;
  }

  // ---- what it costs

  // The part of a working set that does not stay in the cache.
  double missing(double bytes) const { return bytes > cache_ ? 1.0 - cache_ / bytes : 0.0; }

  // Bytes of the arena that hold values before operation i that it or a later one reads.
  double live_before(int i) const {
    int64_t bytes = 0;
    for (const Buffer& buffer : draft_.buffers) {
      if (buffer.home == Home::kArena && buffer.first < i && buffer.last >= i) {
        bytes += buffer.bytes;
      }
    }
    return static_cast<double>(bytes);
  }

  // Written and read again: all images of what is alive.
  double crossing(int i) const {
    const double bytes = live_before(i);
    return 2.0 * bytes * missing(bytes / threads_);
  }

  double cost_of(int i, int64_t slices) const {
    int64_t touched = 0;
    for (const View& view : draft_.views[i]) {
      touched += view.size.elements() * dtype_bytes(view.dtype);
    }
    const View& written = draft_.views[i].back();
    const double out = static_cast<double>(written.size.elements() * dtype_bytes(written.dtype));
    const double working = live_before(i) + out;
    const double share = slices > 1 ? 1.0 / static_cast<double>(slices) : 1.0 / threads_;
    const double loads = slices > 1 ? static_cast<double>(slices) : threads_;
    return static_cast<double>(touched) * missing(working * share) +
           loads * static_cast<double>(draft_.weights[i]) +
           (slices == 1 && threads_ > 1 ? kForkBytes : 0.0);
  }

  const Program& program_;
  const Draft& draft_;
  const int64_t batch_;
  const double cache_;
  const int threads_;
  const int count_;
  std::vector<int64_t> slices_;
};

}  // namespace

std::vector<Slicing> choose_slicings(const Program& program, const Draft& draft, int64_t batch,
                                     int64_t cache, int threads) {
  if (batch < 2 || program.operations.empty()) return {};
  return Chooser(program, draft, batch, cache, threads).run();
}

}  // namespace qk::plan
