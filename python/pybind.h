// pybind11 for the sources that touch no type of torch: facts, and the compiled plan. The copy that
// comes with torch 2.11 refuses to be included where the stable ABI is asked for.
#pragma once

#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
