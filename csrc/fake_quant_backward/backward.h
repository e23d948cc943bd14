// The backward of fake_quant in one pass over the kept input: the gradient of x alone (the
// straight-through estimator), or also those of the scale and the zero point (LSQ, LSQ+).
//
//   v = x * inv[c], r = RNE(v), inside = qmin - zp[c] <= r <= qmax - zp[c] (false for NaN)
//   out      = inside ? grad : 0
//   scale    = factor * sum(grad * (inside ? r - v : clamp(r, qmin - zp[c], qmax - zp[c])))
//   zero     = factor * sum(inside ? 0 : -grad) * scale[c]
//
// or, the rounding left out, those of a clip at learned ends (PACT): inside = qmin - zp[c] <= v <=
// qmax - zp[c], and grad * (inside ? 0 : clamp(v, qmin - zp[c], qmax - zp[c])) in the sum of scale.
//
// Layout: as fake_quant; operand 0 of the grid's walk is `out`, and `grad` has the layout of `out`.
// Memory: owned by the caller, the workspace of the sums too; `out` may alias `grad` exactly.
// Numbers: equal bits on every ISA and for every thread count. `out` has the bits of `grad` where
// it passes, +0 elsewhere. The terms of the sums are float32. A run of at most kSumRun elements is
// summed in 16 float lanes (element i in lane i % 16), its lanes by a tree of doubles, and the runs
// of a channel by another; with the channel innermost, the float lanes are the channels of one task
// of rows. Neither tree depends on the threads. A sum that is NaN is the canonical NaN.
// Trick: `inside` is recomputed instead of kept, and the sums ride along: memory bounds the pass
// (12 bytes an element in float32).
#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc/base/cpu.h"
#include "csrc/base/dtype.h"
#include "csrc/base/parallel.h"
#include "csrc/base/training_numerics.h"
#include "csrc/quantize/grid.h"

namespace qk {

struct FakeQuantBackwardArgs {
  const void* grad;
  const void* x;
  void* out;
  FloatType type;
  int32_t qmin;
  int32_t qmax;
  GridLayout grid;
  bool clips = false;  // PACT; with sums only
};

void fake_quant_backward(const FakeQuantBackwardArgs& args, const Parallel& parallel);

struct LsqSums {
  int64_t channels;  // 1: per tensor
  double factor;
  double* workspace;  // lsq_workspace(grid) elements
  float* scale;       // [channels]
  float* zero_point;  // [channels]
};

int64_t lsq_workspace(const GridLayout& grid);
void lsq_backward(const FakeQuantBackwardArgs& args, const LsqSums& sums, const Parallel& parallel);

// The grid's zero points of learned ones: RNE, then the clamp to [qmin, qmax].
void round_zero_points(const float* learned, int32_t* zero_point, int64_t n, int32_t qmin,
                       int32_t qmax);

inline constexpr int kSumLanes = 16;
inline constexpr int64_t kSumRun = 4096;
// Elements of one task with the channel innermost: the sums of a task are a few percent of them.
inline constexpr int64_t kSumTask = 65536;

// One contiguous run, or with a grid of one channel an element also two at once (the grids and sums
// are then loaded once for both). Its terms are added to `columns` (one float an element, the terms
// of the scale, then kGridBlock floats further those of the zero point) or written to `partial`
// (the sums of the run). Both null: no sums.
struct FakeQuantBackwardRun {
  const void* grad;
  const void* x;
  void* out;
  int64_t n;
  GridSpan grid;
  int32_t qmin;
  int32_t qmax;
  bool stream;      // store past the caches if `out` is aligned; the caller fences
  bool clips;       // PACT; with sums only
  double* partial;  // [2], with a grid that holds for the whole run
  float* columns;   // [2][kGridBlock], with a grid of one channel an element
  int rows = 1;     // 2: the same for the elements at `out_step` and `x_step`
  int64_t out_step = 0;
  int64_t x_step = 0;
};

// An element's bits, to be copied as they are.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
template <typename T>
inline __attribute__((always_inline)) const Bits<T>* bits_of(const T* x) {
  return reinterpret_cast<const Bits<T>*>(x);
}

// The sum of the lanes by halves.
inline double sum_lanes(const float lanes[kSumLanes]) {
  double sum[kSumLanes];
  for (int i = 0; i < kSumLanes; ++i) sum[i] = static_cast<double>(lanes[i]);
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}

// Element i of the run, its terms added to *scale_sum and *zero_sum unless they are null.
template <typename T>
inline __attribute__((always_inline)) void backward_element(const FakeQuantBackwardRun& run,
                                                            int64_t i, float* scale_sum,
                                                            float* zero_sum) {
  const int64_t c = run.grid.per_element ? i : 0;
  const T grad = static_cast<const T*>(run.grad)[i];
  const int32_t zp = run.grid.zero_point[c];
  const float v = to_float(static_cast<const T*>(run.x)[i]) * run.grid.inv_scale[c];
  const bool passes = run.clips ? clip_passes(v, zp, run.qmin, run.qmax)
                                : fake_quant_passes(v, zp, run.qmin, run.qmax);
  static_cast<T*>(run.out)[i] = passes ? grad : T{};
  if (scale_sum == nullptr) return;
  *scale_sum += to_float(grad) * (run.clips ? clip_slope(v, zp, run.qmin, run.qmax)
                                            : fake_quant_slope(v, zp, run.qmin, run.qmax));
  if (!passes) *zero_sum += to_float(grad);
}

using FakeQuantBackwardKernel = void (*)(const FakeQuantBackwardRun&);

#define QK_FAKE_QUANT_BACKWARD_KERNEL(features, type, name) void name(const FakeQuantBackwardRun&);
#include "csrc/fake_quant_backward/kernels.inc"
#undef QK_FAKE_QUANT_BACKWARD_KERNEL

FakeQuantBackwardKernel select_fake_quant_backward_kernel(
    FloatType type, CpuFeatures features = cpu_features_active());

}  // namespace qk
