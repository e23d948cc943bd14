// The arguments of the gradients of fake_quant, checked: what their CPU and CUDA halves share.
#pragma once

#include "csrc/fake_quant_backward/backward.h"
#include "python/layout.h"

namespace qk::seam {

// grad: dtype, shape and device of x.
FloatType check_grad(const char* op, const Tensor& grad, const Tensor& x);
void check_grid_ends(const char* op, int64_t qmin, int64_t qmax);
// A clamp in front of one grid.
Limits check_mask_limits(const char* op, std::optional<int64_t> axis, std::optional<double> floor,
                         std::optional<double> ceiling);
// A learned zero point: float32, on x's device, as many as scales. Its values are not looked at.
void check_learned_zero_point(const char* op, const Tensor& x, const Tensor& scale,
                              const Tensor& zero_point, int64_t qmin, int64_t qmax);
// The grid of a learned zero point on the CPU, its values checked and rounded.
GridView check_learned_grid(const char* op, const Tensor& x, const Tensor& scale,
                            const Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                            int64_t qmax);

// What one backward pass reads and writes; owns the copies that the walk needs.
struct Pass {
  Tensor grad, x;
  FakeQuantBackwardArgs args;

  Pass(const Tensor& grad, const Tensor& x, FloatType type, std::optional<int64_t> axis,
       const GridView& grid, int64_t qmin, int64_t qmax, Tensor out);
};

}  // namespace qk::seam
