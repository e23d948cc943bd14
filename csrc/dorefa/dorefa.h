// DoReFa: weights through tanh onto [-1, 1] and onto a grid, and gradients in few bits, rounded
// stochastically.
//
//   weight     u = tanh(x) * inv, inv = 1 / max(tanh(max |x|), 1e-12), y = fake_quant(u)
//   backward   d = inside ? grad * inv : 0
//              out = (d - [|x| = max |x|] * sign(x) * inv * S / ties) * (1 - tanh(x)^2)
//              S = sum(inside ? grad * u : 0): the gradient that goes through the maximum
//   gradient   L = max |g| of a row (a sample), out = (q / steps - 0.5) * 2L,
//              q = clamp(RNE((g / 2L + 0.5) * steps + noise), 0, steps), 0 where L is 0
//              noise = uniform_noise(noise_key(seed, row), index in the row's memory), in [-0.5,
//              0.5)
//
// Layout: dense memory, float32, bfloat16 or float16. A row is contiguous.
// Memory: owned by the caller, the workspace too; out may alias grad exactly.
// Numbers: equal bits on every ISA and for every thread count; float32 throughout, tanh_float and
// uniform_noise of csrc/base/training_numerics.h. S is summed as the sums of fake_quant_backward. A
// row of gradients that are not all finite becomes NaN, so that a loss scaler sees it.
#pragma once

#include <cstdint>

#include "csrc/base/cpu.h"
#include "csrc/base/dtype.h"
#include "csrc/base/numerics.h"
#include "csrc/base/parallel.h"
#include "csrc/base/training_numerics.h"
#include "csrc/fake_quant_backward/backward.h"

namespace qk {

struct DorefaGrid {
  float scale;
  int32_t zero_point;
  int32_t qmin;
  int32_t qmax;
};

struct DorefaWeightArgs {
  const void* x;
  void* y;
  FloatType type;
  int64_t n;
  float largest;  // max |x|, finite
  DorefaGrid grid;
};

void dorefa_weight(const DorefaWeightArgs& args, const Parallel& parallel);

struct DorefaBackwardArgs {
  const void* grad;
  const void* x;
  void* out;
  FloatType type;
  int64_t n;
  float largest;
  DorefaGrid grid;
  double* workspace;  // dorefa_workspace(n) elements
};

int64_t dorefa_workspace(int64_t n);
void dorefa_weight_backward(const DorefaBackwardArgs& args, const Parallel& parallel);

struct DorefaGradientArgs {
  const void* grad;
  void* out;
  FloatType type;
  int64_t rows;
  int64_t inner;
  int32_t steps;  // 2^bits - 1
  uint64_t seed;
};

void dorefa_gradient(const DorefaGradientArgs& args, const Parallel& parallel);

// One run of each. The constants of a weight are computed once.
struct DorefaWeight {
  float inv_largest;  // of tanh
  float inv_scale;
  DorefaGrid grid;
};

QK_HD DorefaWeight dorefa_constants(float largest, const DorefaGrid& grid) {
  const float top = tanh_float(largest);
  return {1.0f / (top > 1e-12f ? top : 1e-12f), 1.0f / grid.scale, grid};
}

struct DorefaWeightRun {
  const void* x;
  void* y;
  int64_t n;
  DorefaWeight weight;
};

struct DorefaBackwardRun {
  const void* grad;
  const void* x;
  void* out;
  int64_t n;
  DorefaWeight weight;
  double* sum;  // the run's part of S
};

struct DorefaGradientRun {
  const void* grad;
  void* out;
  int64_t n;
  float twice_largest;  // 2L, positive and finite
  float inv;            // 1 / 2L
  int32_t steps;
  NoiseKey key;
};

template <typename T>
QK_HD void dorefa_weight_element(const DorefaWeightRun& run, int64_t i) {
  const DorefaWeight& w = run.weight;
  const float u = tanh_float(to_float(static_cast<const T*>(run.x)[i])) * w.inv_largest;
  from_float(fake_quant(u, w.grid.scale, w.inv_scale, w.grid.zero_point, w.grid.qmin, w.grid.qmax),
             static_cast<T*>(run.y) + i);
}

// The gradient of element i, `through_maximum` apart; its part of S is added to *sum.
template <typename T>
QK_HD void dorefa_backward_element(const DorefaBackwardRun& run, int64_t i, float* sum,
                                   float through_maximum) {
  const DorefaWeight& w = run.weight;
  const float g = to_float(static_cast<const T*>(run.grad)[i]);
  const float t = tanh_float(to_float(static_cast<const T*>(run.x)[i])), u = t * w.inv_largest;
  const bool passes =
      fake_quant_passes(u * w.inv_scale, w.grid.zero_point, w.grid.qmin, w.grid.qmax);
  const float d = passes ? g * w.inv_largest : 0.0f;
  *sum += passes ? g * u : 0.0f;
  from_float((d - through_maximum) * fma(-t, t, 1.0f), static_cast<T*>(run.out) + i);
}

// Of the gradient g of element i.
QK_HD float dorefa_gradient_value(const DorefaGradientRun& run, float g, int64_t i) {
  const float steps = static_cast<float>(run.steps);
  const float noise = uniform_noise(run.key, static_cast<uint32_t>(i));
  const float v = round_nearest_even((g * run.inv + 0.5f) * steps + noise);
  const float q = clamp_nan_to_lo(v, 0.0f, steps);
  return (q / steps - 0.5f) * run.twice_largest;
}

template <typename T>
QK_HD void dorefa_gradient_element(const DorefaGradientRun& run, int64_t i) {
  const float g = to_float(static_cast<const T*>(run.grad)[i]);
  from_float(dorefa_gradient_value(run, g, i), static_cast<T*>(run.out) + i);
}

using DorefaWeightKernel = void (*)(const DorefaWeightRun&);
using DorefaBackwardKernel = void (*)(const DorefaBackwardRun&);
using DorefaGradientKernel = void (*)(const DorefaGradientRun&);

#define QK_DOREFA_KERNELS(features, type, weight, backward, gradient) \
  void weight(const DorefaWeightRun&);                                \
  void backward(const DorefaBackwardRun&);                            \
  void gradient(const DorefaGradientRun&);
#include "csrc/dorefa/kernels.inc"
#undef QK_DOREFA_KERNELS

struct DorefaKernels {
  DorefaWeightKernel weight;
  DorefaBackwardKernel backward;
  DorefaGradientKernel gradient;
};

DorefaKernels select_dorefa_kernels(FloatType type, CpuFeatures features = cpu_features_active());

}  // namespace qk
