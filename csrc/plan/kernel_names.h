// Which kernel an operation of a plan runs, by name, for descriptions.
#pragma once

#include "csrc/base/cpu.h"
#include "csrc/base/dtype.h"
#include "csrc/conv/conv.h"
#include "csrc/plan/format.h"

namespace qk::plan {

const char* igemm_kernel_name(Isa isa);
const char* conv_kernel_name(const ConvArgs& args, int64_t threads);
const char* quantize_kernel_name(FloatType type);
const char* dequantize_kernel_name(FloatType type);
const char* lookup_kernel_name();
const char* binary_kernel_name(bool multiply);
const char* max_pool_kernel_name();
const char* avg_pool_kernel_name();

}  // namespace qk::plan
