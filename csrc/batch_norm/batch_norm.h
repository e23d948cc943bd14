// Batch normalization in training together with the fake-quantization behind it: two passes over
// memory forward, two backward, where the steps one by one take twice as many.
//
//   statistics  mean[c], inv_std[c] = 1 / sqrt(var[c] + eps) (var biased)
//               factor[c] = inv_std[c] * weight[c], shift[c] = bias[c] - mean[c] * factor[c]
//               running = running + momentum * (batch - running), the variance unbiased
//   forward     t = fma(x, factor[c], shift[c]), u = clamp(t, floor, ceiling)
//               y = fake_quant(u), code = quantize(u)
//   backward    g    = passes ? grad : 0, passes = floor < t < ceiling and fake_quant's of u
//               bias = sum(g), weight = inv_std[c] * sum(g * (x - mean[c]))
//               out  = factor[c] * (g - bias / rows - (x - mean[c]) * inv_std[c] * weight / rows)
//               and, for a learned grid, the sums of scale and zero point as in
//               fake_quant_backward.h, of u where floor < t < ceiling
//
// Layout: [rows, channels] float32 in one block, the channel innermost: channels_last memory.
// Memory: owned by the caller, the workspaces too; out may alias grad exactly.
// Numbers: equal bits on every ISA and for every thread count. y and code are those of fake_quant
// and quantize at u. Sums: a column of a task of rows in float32, in order; columns of one channel
// in order and tasks by a tree in double. The statistics are sums of
// differences to the first row: they do not cancel where the mean is far from zero.
// Trick: t is computed again in the backward instead of kept, x is kept by the convolution anyway;
// the extremes that an observer wants of t follow from those of x, which cost no pass of their own.
// The first pass of each direction goes through the tasks from the end, which the convolution
// before has written last; the second one starts where the first has stopped, in the cache.
#pragma once

#include <cstdint>
#include <limits>

#include "csrc/base/cpu.h"
#include "csrc/base/parallel.h"
#include "csrc/base/training_numerics.h"
#include "csrc/quantize/grid.h"

namespace qk {

struct BatchStatisticsArgs {
  const float* x;
  int64_t rows;  // at least 2
  int64_t channels;
  const float* weight;  // [channels]; null: 1
  const float* bias;    // [channels]; null: 0
  float* running_mean;  // [channels]
  float* running_var;
  double momentum;
  double eps;
  float* mean;
  float* inv_std;
  float* factor;
  float* shift;
  double* workspace;  // batch_statistics_workspace(rows, channels) elements
};

// The extremes of t; both NaN if x holds one.
struct Extremes {
  float low, high;
};

int64_t batch_statistics_workspace(int64_t rows, int64_t channels);
Extremes batch_statistics(const BatchStatisticsArgs& args, const Parallel& parallel);

// A grid for the whole tensor, and the clamp before it.
struct NormGrid {
  float scale;
  int32_t zero_point;
  int32_t qmin;
  int32_t qmax;
  float floor = -std::numeric_limits<float>::infinity();
  float ceiling = std::numeric_limits<float>::infinity();
};

struct NormFakeQuantArgs {
  const float* x;
  float* y;
  uint8_t* codes;  // null: none
  int64_t rows;
  int64_t channels;
  const float* factor;
  const float* shift;
  NormGrid grid;
};

void norm_fake_quant(const NormFakeQuantArgs& args, const Parallel& parallel);

struct NormBackwardArgs {
  const float* grad;
  const float* x;
  float* out;
  int64_t rows;
  int64_t channels;
  const float* mean;
  const float* inv_std;
  const float* factor;
  const float* shift;
  NormGrid grid;
  bool learned;        // else the clamp is none, and the two sums of the grid are not made
  double grad_factor;  // of these sums
  float* weight;       // [channels], the gradients
  float* bias;
  float* scale;  // [1]
  float* zero_point;
  double* workspace;  // norm_backward_workspace(rows, channels) elements
};

int64_t norm_backward_workspace(int64_t rows, int64_t channels);
void norm_backward(const NormBackwardArgs& args, const Parallel& parallel);

// What a kernel sees: some rows of n columns (at most kGridBlock), `stride` elements apart, and
// what belongs to each column. A column is a channel, or one of several of it where rows are
// folded.
struct NormRows {
  int64_t stride, rows, n;
};

// Sums and extremes are added to what is there. True if a NaN was seen.
struct StatisticsRun {
  NormRows at;
  const float* x;
  const float* origin;
  float* sum;     // of x - origin
  float* square;  // of its square
  float* low;
  float* high;
};

// As the kernels want a NormGrid.
struct NormSteps {
  float scale, inv_scale, lo, hi, zero_point, floor, ceiling;
};

struct NormFakeQuantRun {
  NormRows at;
  const float* x;
  float* y;
  uint8_t* codes;  // null: none
  const float* factor;
  const float* shift;
  NormSteps grid;
  bool stream;  // store past the caches if y is aligned; the caller fences
};

// What belongs to a column in the backward: out = factor * g + slope * (x - mean) + offset.
enum NormColumn { kFactor, kShift, kMean, kSlope, kOffset, kNormColumns };
inline constexpr int kNormSums = 4;  // bias, weight, scale, zero point

struct NormBackwardRun {
  NormRows at;
  const float* grad;
  const float* x;
  float* out;            // null: sums
  const float* columns;  // [kNormColumns][kGridBlock], the last two for `out` only
  NormSteps grid;
  bool learned;
  bool stream;
  float* sums;  // [kNormSums][kGridBlock]

  const float* column(NormColumn which) const { return columns + which * kGridBlock; }
};

// One column of a StatisticsRun.
inline __attribute__((always_inline)) bool statistics_column(const StatisticsRun& run, int64_t j) {
  const float origin = run.origin[j];
  float sum = run.sum[j], square = run.square[j], low = run.low[j], high = run.high[j];
  bool nan = false;
  for (int64_t r = 0; r < run.at.rows; ++r) {
    const float v = run.x[r * run.at.stride + j], d = v - origin;
    sum += d;
    square += d * d;
    if (v < low) low = v;
    if (v > high) high = v;
    nan |= v != v;
  }
  run.sum[j] = sum;
  run.square[j] = square;
  run.low[j] = low;
  run.high[j] = high;
  return nan;
}

inline __attribute__((always_inline)) float norm_value(const NormSteps& grid, float t) {
  return t > grid.floor ? (t < grid.ceiling ? t : grid.ceiling) : grid.floor;
}

inline __attribute__((always_inline)) void norm_fake_quant_element(const NormFakeQuantRun& run,
                                                                   int64_t r, int64_t j) {
  const int64_t i = r * run.at.stride + j;
  const NormSteps& grid = run.grid;
  const float v = norm_value(grid, fma(run.x[i], run.factor[j], run.shift[j])) * grid.inv_scale;
  const float q = round_nearest_even(clamp_nan_to_lo(v, grid.lo, grid.hi)) + 0.0f;
  run.y[i] = q * grid.scale;
  if (run.codes != nullptr) {
    run.codes[i] = static_cast<uint8_t>(static_cast<int32_t>(q + grid.zero_point));
  }
}

// The terms of the sums of element i of column j.
struct NormTerms {
  float value[kNormSums];
};
template <bool kLearned>
inline __attribute__((always_inline)) NormTerms norm_terms(const NormBackwardRun& run, int64_t i,
                                                           int64_t j) {
  const NormSteps& grid = run.grid;
  const float x = run.x[i], grad = run.grad[i],
              t = fma(x, run.column(kFactor)[j], run.column(kShift)[j]);
  const float v = (kLearned ? norm_value(grid, t) : t) * grid.inv_scale;
  const float r = round_nearest_even(v);
  const bool inside = r >= grid.lo && r <= grid.hi;
  const bool passes = inside && (!kLearned || (t > grid.floor && t < grid.ceiling));
  const float g = passes ? grad : 0.0f;
  NormTerms terms{{g, g * (x - run.column(kMean)[j]), 0.0f, 0.0f}};
  if constexpr (kLearned) {
    terms.value[2] = grad * (inside ? r - v : clamp_nan_to_lo(r, grid.lo, grid.hi));
    terms.value[3] = inside ? 0.0f : grad;
  }
  return terms;
}

template <bool kLearned>
inline __attribute__((always_inline)) void norm_sums_column(const NormBackwardRun& run, int64_t j) {
  for (int64_t r = 0; r < run.at.rows; ++r) {
    const NormTerms terms = norm_terms<kLearned>(run, r * run.at.stride + j, j);
    for (int s = 0; s < (kLearned ? kNormSums : 2); ++s) {
      run.sums[s * kGridBlock + j] += terms.value[s];
    }
  }
}

template <bool kLearned>
inline __attribute__((always_inline)) void norm_out_element(const NormBackwardRun& run, int64_t r,
                                                            int64_t j) {
  const int64_t i = r * run.at.stride + j;
  const float g = norm_terms<kLearned>(run, i, j).value[0];
  run.out[i] = fma(run.column(kSlope)[j], run.x[i] - run.column(kMean)[j],
                   fma(run.column(kFactor)[j], g, run.column(kOffset)[j]));
}

using StatisticsKernel = bool (*)(const StatisticsRun&);
using NormFakeQuantKernel = void (*)(const NormFakeQuantRun&);
using NormBackwardKernel = void (*)(const NormBackwardRun&);

struct NormKernels {
  StatisticsKernel statistics;
  NormFakeQuantKernel fake_quant;
  NormBackwardKernel backward;
};

#define QK_NORM_KERNELS(features, isa)                 \
  bool norm_statistics_##isa(const StatisticsRun&);    \
  void norm_fake_quant_##isa(const NormFakeQuantRun&); \
  void norm_backward_##isa(const NormBackwardRun&);
#include "csrc/batch_norm/kernels.inc"
#undef QK_NORM_KERNELS

NormKernels select_norm_kernels(CpuFeatures features = cpu_features_active());

}  // namespace qk
