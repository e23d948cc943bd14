// The compiled plan as Python sees it.
#pragma once

#include "python/pybind.h"

namespace qk::seam {

// Defines the class Plan and plan_checksum in the module.
void bind_plan(pybind11::module_& m);

}  // namespace qk::seam
