// The arguments of quantize, dequantize and fake_quant, checked: what their CPU and CUDA halves
// share. A call owns what its args point at.
#pragma once

#include "csrc/fake_quant/fake_quant.h"
#include "csrc/quantize/quantize.h"
#include "python/layout.h"

namespace qk::seam {

template <class Args>
struct GridCall {
  Tensor x;  // what is read: the argument, or a copy of it that can be walked in out's order
  std::optional<int64_t> axis;
  GridView grid;
  Args args;
};

GridCall<QuantizeArgs> check_quantize(const Tensor& x, const Tensor& scale,
                                      const Tensor& zero_point, std::optional<int64_t> axis,
                                      int64_t qmin, int64_t qmax, Tensor out);
GridCall<DequantizeArgs> check_dequantize(const Tensor& q, const Tensor& scale,
                                          const Tensor& zero_point, std::optional<int64_t> axis,
                                          Tensor out);
GridCall<FakeQuantArgs> check_fake_quant(const Tensor& x, const Tensor& scale,
                                         const Tensor& zero_point, std::optional<int64_t> axis,
                                         int64_t qmin, int64_t qmax, Tensor out);

}  // namespace qk::seam
