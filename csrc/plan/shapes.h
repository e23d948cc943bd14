// The sizes of every value of a network, from the sizes of its inputs.
#pragma once

#include <vector>

#include "csrc/plan/view.h"

namespace qk::plan {

struct Shapes {
  std::vector<Sizes> values;
  std::vector<int64_t> scalars;
};

// Python's x[start:stop:step]: the first index and how many.
struct Slice {
  int64_t first, count;
};
Slice slice_of(int64_t start, int64_t stop, int64_t step, int64_t size);

// `inputs`: sizes of the inputs in call order. An error names the input or the step that they do
// not fit.
Error infer_shapes(const Model& model, const std::vector<Sizes>& inputs, Shapes* shapes);

}  // namespace qk::plan
