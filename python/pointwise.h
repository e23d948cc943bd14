// The arguments of lookup, add, mul and cat, checked: what their CPU and CUDA halves share. A call
// owns what its args point at.
#pragma once

#include <vector>

#include "csrc/pointwise/pointwise.h"
#include "python/layout.h"

namespace qk::seam {

struct LookupCall {
  Tensor q, table, out;
  LookupArgs args;
};
LookupCall check_lookup(const Tensor& q, const Tensor& table);

struct BinaryNumbers {
  double a_scale;
  int64_t a_zero_point;
  double b_scale;
  int64_t b_zero_point;
  double scale;
  int64_t zero_point, qmin, qmax;
  ScalarType dtype;
};
struct BinaryCall {
  Tensor a, b, out;
  BinaryArgs args;
};
BinaryCall check_binary(const char* op, BinaryOp kind, const Tensor& a, const Tensor& b,
                        const BinaryNumbers& numbers);

struct CatCall {
  Tensor tables, out;
  std::vector<Tensor> owners;
  std::vector<CatInput> inputs;
  int64_t rows;

  CatArgs args() {
    return {inputs.data(), static_cast<int64_t>(inputs.size()),
            static_cast<uint8_t*>(out.mutable_data_ptr()), rows};
  }
};
CatCall check_cat(const std::vector<Tensor>& tensors, const Tensor& tables, int64_t dim);

}  // namespace qk::seam
