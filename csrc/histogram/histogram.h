// A histogram of everything seen, over a range that grows with the data: what the observers that
// search a range keep.
//
//   range   low = min(low, batch low), high = max(high, batch high); the first batch replaces it
//   old     each bin is cut into kHistogramPieces equal pieces; a piece goes whole to the bin of
//           the new range in which its middle lies; a range of one point moves as a whole
//   new     bin of v = floor((v - low) * bins / (high - low)); values outside of the range, and
//           NaN, are left out
//   bins    float(count of the batch) + the mass that has moved there
//
// Layout: x is any run of floats. Memory: owned by the caller, the workspace too.
// Numbers: those of torch.histc and of torch.ao's HistogramObserver, and the same for every thread
// count: counts are integers, and the pieces of a bin are added in their order.
// Trick: middles and edges rise with their number, so the pieces of a bin are a run that a binary
// search finds: a bin can be computed without the others.
#pragma once

#include <cstdint>

#include "csrc/base/dtype.h"
#include "csrc/base/numerics.h"
#include "csrc/base/parallel.h"

namespace qk {

inline constexpr int64_t kHistogramPieces = 16;
inline constexpr int64_t kMaxHistogramBins = int64_t{1} << 20;

struct HistogramArgs {
  const void* x;
  FloatType type;
  int64_t n;
  float batch_low, batch_high;  // low > high, or one of them not finite: nothing changes
  float* low;                   // [1]; low > high: nothing seen yet
  float* high;
  float* histogram;  // [bins]
  int64_t bins;
  void* workspace;  // histogram_workspace bytes
};

int64_t histogram_workspace(int64_t n, int64_t bins);
void observe_histogram(const HistogramArgs& args, const Parallel& parallel);

struct HistogramRange {
  float low, high;

  QK_HD bool is_empty() const { return !(low <= high); }
  QK_HD bool operator==(const HistogramRange& other) const {
    return low == other.low && high == other.high;
  }
};

QK_HD bool is_finite_range(const HistogramRange& r) {
  return r.low <= r.high && r.low - r.low == 0.0f && r.high - r.high == 0.0f;
}

QK_HD HistogramRange wider(const HistogramRange& old, const HistogramRange& batch) {
  if (old.is_empty()) return batch;
  return {batch.low < old.low ? batch.low : old.low, batch.high > old.high ? batch.high : old.high};
}

// Negative: v is not in the range.
QK_HD int32_t histogram_bin(const HistogramRange& range, int64_t bins, float v) {
  if (!(v >= range.low && v <= range.high)) return -1;
  if (range.low == range.high) return static_cast<int32_t>(bins / 2);
  const float at = (v - range.low) * static_cast<float>(bins) / (range.high - range.low);
  if (!(at >= 0.0f)) return 0;  // the range is too wide for a float
  return static_cast<int32_t>(at < static_cast<float>(bins) ? at : static_cast<float>(bins - 1));
}

// The first piece of the old histogram whose middle is not below the lower edge of bin `j`.
QK_HD int64_t first_piece(const HistogramRange& old, const HistogramRange& now, int64_t bins,
                          int64_t j) {
  const int64_t pieces = bins * kHistogramPieces;
  if (j <= 0) return 0;
  if (j >= bins) return pieces;
  const float step = (old.high - old.low) / static_cast<float>(pieces);
  const float edge =
      now.low + (now.high - now.low) / static_cast<float>(bins) * static_cast<float>(j);
  int64_t below = 0, above = pieces;
  while (below < above) {
    const int64_t middle = (below + above) / 2;
    if (old.low + step * static_cast<float>(middle) + 0.5f * step >= edge) {
      above = middle;
    } else {
      below = middle + 1;
    }
  }
  return below;
}

// What bin `j` of the range `now` gets of the old histogram.
QK_HD float moved_mass(const float* histogram, const HistogramRange& old, const HistogramRange& now,
                       int64_t bins, int64_t j) {
  if (old.is_empty()) return 0.0f;
  if (old == now) return histogram[j];
  float mass = 0.0f;
  if (old.low == old.high) {
    if (histogram_bin(now, bins, old.low) != j) return 0.0f;
    for (int64_t i = 0; i < bins; ++i) mass += histogram[i];
    return mass;
  }
  const int64_t end = first_piece(old, now, bins, j + 1);
  for (int64_t p = first_piece(old, now, bins, j); p < end; ++p) {
    mass += histogram[p / kHistogramPieces] / static_cast<float>(kHistogramPieces);
  }
  return mass;
}

}  // namespace qk
