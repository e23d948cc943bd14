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
//               fake_quant_backward.h, of u where floor < t < ceiling; for another, the clamp
//               leaves fewer codes instead: passes = fake_quant's of t on these
//
// Layout: [rows, channels] float32 in one block, the channel innermost: channels_last memory.
// Memory: owned by the caller, the workspaces too; out may alias grad exactly.
// Numbers: equal bits on every ISA and for every thread count. y and code are those of fake_quant
// and quantize at u. Sums: a column of a task of rows in float32, in order; columns of one channel
// in order and tasks by a tree in double (walk.h, tree_sum.h). The statistics are sums of
// differences to the first row: they do not cancel where the mean is far from zero. What belongs to
// a channel or to the grid and is NaN is the canonical NaN.
// Trick: t is computed again in the backward instead of kept, x is kept by the convolution anyway;
// the extremes that an observer wants of t follow from those of x, which cost no pass of their own.
// The first pass of each direction goes through the tasks from the end, which the convolution
// before has written last; the second one starts where the first has stopped, in the cache.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "csrc/base/cpu.h"
#include "csrc/base/dtype.h"
#include "csrc/base/parallel.h"
#include "csrc/base/training_numerics.h"
#include "csrc/batch_norm/walk.h"

namespace qk {

inline constexpr float kNormInfinity = std::numeric_limits<float>::infinity();

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

// The extremes of t, a zero as +0; both NaN if x holds one.
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
  float floor = -kNormInfinity;
  float ceiling = kNormInfinity;
};

// Grid: NormGrid, or where the grid lies on a device.
template <class Grid>
struct NormFakeQuantOf {
  const float* x;
  float* y;
  uint8_t* codes;  // null: none
  int64_t rows;
  int64_t channels;
  const float* factor;
  const float* shift;
  Grid grid;
};
using NormFakeQuantArgs = NormFakeQuantOf<NormGrid>;

void norm_fake_quant(const NormFakeQuantArgs& args, const Parallel& parallel);

template <class Grid>
struct NormBackwardOf {
  const float* grad;
  const float* x;
  float* out;
  int64_t rows;
  int64_t channels;
  const float* mean;
  const float* inv_std;
  const float* factor;
  const float* shift;
  Grid grid;
  bool learned;        // else straight through, and the two sums of the grid are not made
  double grad_factor;  // of these sums
  float* weight;       // [channels], the gradients
  float* bias;
  float* scale;  // [1]
  float* zero_point;
  double* workspace;  // as many elements as norm_backward_workspace says, or the device's one
};
using NormBackwardArgs = NormBackwardOf<NormGrid>;

int64_t norm_backward_workspace(int64_t rows, int64_t channels);
void norm_backward(const NormBackwardArgs& args, const Parallel& parallel);

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

QK_HD NormSteps norm_steps(const NormGrid& grid) {
  return {.scale = grid.scale,
          .inv_scale = 1.0f / grid.scale,
          .lo = static_cast<float>(grid.qmin - grid.zero_point),
          .hi = static_cast<float>(grid.qmax - grid.zero_point),
          .zero_point = static_cast<float>(grid.zero_point),
          .floor = grid.floor,
          .ceiling = grid.ceiling};
}

// Straight through a clamp: it leaves fewer codes.
QK_HD NormGrid without_clamp(const NormGrid& grid) {
  const CodeEnds left = clamped_ends(grid.floor, grid.ceiling, 1.0f / grid.scale, grid.zero_point,
                                     grid.qmin, grid.qmax);
  return {.scale = grid.scale,
          .zero_point = grid.zero_point,
          .qmin = left.qmin,
          .qmax = left.qmax,
          .floor = -kNormInfinity,
          .ceiling = kNormInfinity};
}

// ---- an element, the same on the CPU and on CUDA ----

// The sums and extremes of one column.
struct ColumnStatistics {
  float sum, square, low, high;

  QK_HD void add(float v, float origin) {
    const float d = v - origin;
    sum += d;
    square += d * d;
    if (v < low) low = v;
    if (v > high) high = v;
  }
};

QK_HD float norm_value(const NormSteps& grid, float t) {
  return t > grid.floor ? (t < grid.ceiling ? t : grid.ceiling) : grid.floor;
}

// The code of t, as an offset from the zero point.
QK_HD float norm_offset(const NormSteps& grid, float t) {
  const float v = norm_value(grid, t) * grid.inv_scale;
  return round_nearest_even(clamp_nan_to_lo(v, grid.lo, grid.hi)) + 0.0f;
}
QK_HD uint8_t norm_code(const NormSteps& grid, float offset) {
  return static_cast<uint8_t>(static_cast<int32_t>(offset + grid.zero_point));
}

// The terms of the sums of one element; the first is what passes of its gradient.
struct NormTerms {
  float value[kNormSums];
};
template <bool kLearned>
QK_HD NormTerms norm_terms(const NormSteps& grid, float grad, float x, float factor, float shift,
                           float mean) {
  const float t = fma(x, factor, shift);
  const float v = (kLearned ? norm_value(grid, t) : t) * grid.inv_scale;
  const float r = round_nearest_even(v);
  const bool inside = r >= grid.lo && r <= grid.hi;
  const bool passes = inside && (!kLearned || (t > grid.floor && t < grid.ceiling));
  const float g = passes ? grad : 0.0f;
  NormTerms terms{{g, g * (x - mean), 0.0f, 0.0f}};
  if constexpr (kLearned) {
    terms.value[2] = grad * (inside ? r - v : clamp_nan_to_lo(r, grid.lo, grid.hi));
    terms.value[3] = inside ? 0.0f : grad;
  }
  return terms;
}

// The gradient of x, where g has passed.
QK_HD float norm_gradient(float g, float x, float factor, float mean, float slope, float offset) {
  return fma(slope, x - mean, fma(factor, g, offset));
}

// ---- a channel, the same on the CPU and on CUDA ----

QK_HD float norm_float(double value) {
  return value != value ? bits_float(0x7fc00000u) : static_cast<float>(value);
}

// t at the extremes of the x of a channel.
struct NormEnds {
  float value[2];
};

// Channel c from its sums and extremes.
QK_HD NormEnds finish_statistics(const BatchStatisticsArgs& args, int64_t c, double sum,
                                 double square, float low, float high) {
  const auto rows = static_cast<double>(args.rows);
  const double difference = sum / rows, mean = static_cast<double>(args.x[c]) + difference;
  const double spread = square / rows - difference * difference;
  const double variance = spread > 0 || spread != spread ? spread : 0;
  const float inv_std = norm_float(1.0 / std::sqrt(variance + args.eps));
  const float weight = args.weight == nullptr ? 1.0f : args.weight[c];
  const float factor = norm_float(static_cast<double>(inv_std * weight));
  const double bias = args.bias == nullptr ? 0.0 : static_cast<double>(args.bias[c]);
  const float shift = norm_float(bias - mean * static_cast<double>(factor));
  args.mean[c] = norm_float(mean);
  args.inv_std[c] = inv_std;
  args.factor[c] = factor;
  args.shift[c] = shift;
  const auto follow = [&](float* running, double batch) {
    const auto old = static_cast<double>(running[c]);
    running[c] = norm_float(old + args.momentum * (batch - old));
  };
  follow(args.running_mean, mean);
  follow(args.running_var, variance * (rows / (rows - 1)));
  return {{fma(low, factor, shift), fma(high, factor, shift)}};
}

// Of the ends of all channels, in any order. A NaN in x is among them: it is in the sums.
struct NormExtremes {
  float low = kNormInfinity, high = -kNormInfinity;
  bool nan = false;

  QK_HD void add(const NormEnds& ends) {
    for (const float end : ends.value) {
      nan |= end != end;
      low = end < low ? end : low;
      high = end > high ? end : high;
    }
  }
  QK_HD Extremes found() const {
    const float none = bits_float(0x7fc00000u);
    return {nan ? none : low + 0.0f, nan ? none : high + 0.0f};
  }
};

// The gradients of a channel from its sums, and its part in the gradient of x.
struct NormChannelGradients {
  float weight, bias, slope, offset;
};
QK_HD NormChannelGradients finish_gradients(double bias, double product, float inv_std,
                                            float factor, double rows) {
  const auto inverse = static_cast<double>(inv_std), by = static_cast<double>(factor);
  return {.weight = norm_float(product * inverse),
          .bias = norm_float(bias),
          .slope = norm_float(-by * inverse * inverse * product / rows),
          .offset = norm_float(-by * bias / rows)};
}

// The gradients of the grid from its sums.
QK_HD float finish_scale(double sum, double grad_factor) { return norm_float(sum * grad_factor); }
QK_HD float finish_zero_point(double sum, float scale, double grad_factor) {
  return norm_float(-(sum * static_cast<double>(scale)) * grad_factor);
}

// ---- a run, of which the kernels do whole vectors ----

// One column of a StatisticsRun.
QK_HD bool statistics_column(const StatisticsRun& run, int64_t j) {
  ColumnStatistics column{run.sum[j], run.square[j], run.low[j], run.high[j]};
  bool nan = false;
  for (int64_t r = 0; r < run.at.rows; ++r) {
    const float v = run.x[r * run.at.stride + j];
    column.add(v, run.origin[j]);
    nan |= v != v;
  }
  run.sum[j] = column.sum;
  run.square[j] = column.square;
  run.low[j] = column.low;
  run.high[j] = column.high;
  return nan;
}

QK_HD void norm_fake_quant_element(const NormFakeQuantRun& run, int64_t r, int64_t j) {
  const int64_t i = r * run.at.stride + j;
  const float offset = norm_offset(run.grid, fma(run.x[i], run.factor[j], run.shift[j]));
  run.y[i] = offset * run.grid.scale;
  if (run.codes != nullptr) run.codes[i] = norm_code(run.grid, offset);
}

// The terms of element i of column j.
template <bool kLearned>
QK_HD NormTerms norm_terms(const NormBackwardRun& run, int64_t i, int64_t j) {
  return norm_terms<kLearned>(run.grid, run.grad[i], run.x[i], run.column(kFactor)[j],
                              run.column(kShift)[j], run.column(kMean)[j]);
}

template <bool kLearned>
QK_HD void norm_sums_column(const NormBackwardRun& run, int64_t j) {
  for (int64_t r = 0; r < run.at.rows; ++r) {
    const NormTerms terms = norm_terms<kLearned>(run, r * run.at.stride + j, j);
    for (int s = 0; s < (kLearned ? kNormSums : 2); ++s) {
      run.sums[s * kGridBlock + j] += terms.value[s];
    }
  }
}

template <bool kLearned>
QK_HD void norm_out_element(const NormBackwardRun& run, int64_t r, int64_t j) {
  const int64_t i = r * run.at.stride + j;
  const float g = norm_terms<kLearned>(run, i, j).value[0];
  run.out[i] = norm_gradient(g, run.x[i], run.column(kFactor)[j], run.column(kMean)[j],
                             run.column(kSlope)[j], run.column(kOffset)[j]);
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
