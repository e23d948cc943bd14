// How the modules would lay out every value: with the strides that qkernels.ops and torch's views
// give, whatever the executor does inside. Outputs follow it, because what torch's float kernels
// compute from them depends on strides to the last bit.
//
// Strides of dimensions of size 1 are those of a reshape, where torch has other views with others.
#pragma once

#include <vector>

#include "csrc/plan/program.h"

namespace qk::plan {

// The strides of torch.empty_like(like), which has the sizes of `view`: those of a dense tensor as
// they are, others made dense in their order.
void set_like(View* view, const View& like);

// By value; sizes, dtypes and strides, without memory.
std::vector<View> module_layouts(const Model& model, const Shapes& shapes,
                                 const std::vector<InputLayout>& inputs);

}  // namespace qk::plan
