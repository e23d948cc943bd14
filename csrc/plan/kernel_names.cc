#include "csrc/plan/kernel_names.h"

#include "csrc/conv/winograd.h"
#include "csrc/pointwise/pointwise.h"

namespace qk::plan {

const char* igemm_kernel_name(Isa isa) {
#define QK_IGEMM_KERNEL(need, layout, name) \
  if (isa == layout) return #name;
#include "csrc/gemm/kernels.inc"
#undef QK_IGEMM_KERNEL
  return "";
}

const char* conv_kernel_name(const ConvArgs& args, int64_t threads) {
  const Isa isa = args.packed->isa;
  const bool is_depthwise = args.packed->kind == ConvKind::kDepthwise;
  const bool is_winograd = uses_winograd(args, threads);
  if (!is_depthwise && !is_winograd) return igemm_kernel_name(isa);
  const Isa vectors = isa == Isa::kAmx ? Isa::kAvx512Vnni : isa;
#define QK_DEPTHWISE_KERNEL(need, layout, name) \
  if (is_depthwise && vectors == layout) return #name;
#define QK_WINOGRAD_KERNEL(need, layout, name) \
  if (is_winograd && vectors == layout) return #name;
#include "csrc/conv/kernels.inc"
#undef QK_DEPTHWISE_KERNEL
#undef QK_WINOGRAD_KERNEL
  return "";
}

const char* quantize_kernel_name(FloatType wanted) {
  const CpuFeatures features = cpu_features_active();
#define QK_QUANTIZE_KERNEL(need, type, name) \
  if (wanted == type && has_features(features, need)) return #name;
#define QK_DEQUANTIZE_KERNEL(need, type, name)
#include "csrc/quantize/kernels.inc"
#undef QK_QUANTIZE_KERNEL
#undef QK_DEQUANTIZE_KERNEL
  return "";
}

const char* dequantize_kernel_name(FloatType wanted) {
  const CpuFeatures features = cpu_features_active();
#define QK_QUANTIZE_KERNEL(need, type, name)
#define QK_DEQUANTIZE_KERNEL(need, type, name) \
  if (wanted == type && has_features(features, need)) return #name;
#include "csrc/quantize/kernels.inc"
#undef QK_QUANTIZE_KERNEL
#undef QK_DEQUANTIZE_KERNEL
  return "";
}

const char* lookup_kernel_name() {
  const CpuFeatures features = cpu_features_active();
#define QK_LOOKUP_KERNEL(need, name) \
  if (has_features(features, need)) return #name;
#define QK_BINARY_KERNEL(need, op, name)
#include "csrc/pointwise/kernels.inc"
#undef QK_LOOKUP_KERNEL
#undef QK_BINARY_KERNEL
  return "";
}

const char* binary_kernel_name(bool multiply) {
  const CpuFeatures features = cpu_features_active();
  const BinaryOp wanted = multiply ? BinaryOp::kMul : BinaryOp::kAdd;
#define QK_LOOKUP_KERNEL(need, name)
#define QK_BINARY_KERNEL(need, op, name) \
  if (wanted == op && has_features(features, need)) return #name;
#include "csrc/pointwise/kernels.inc"
#undef QK_LOOKUP_KERNEL
#undef QK_BINARY_KERNEL
  return "";
}

const char* max_pool_kernel_name() {
  const CpuFeatures features = cpu_features_active();
#define QK_MAX_POOL_KERNEL(need, name) \
  if (has_features(features, need)) return #name;
#define QK_AVG_POOL_KERNEL(need, name)
#include "csrc/pool/kernels.inc"
#undef QK_MAX_POOL_KERNEL
#undef QK_AVG_POOL_KERNEL
  return "";
}

const char* avg_pool_kernel_name() {
  const CpuFeatures features = cpu_features_active();
#define QK_MAX_POOL_KERNEL(need, name)
#define QK_AVG_POOL_KERNEL(need, name) \
  if (has_features(features, need)) return #name;
#include "csrc/pool/kernels.inc"
#undef QK_MAX_POOL_KERNEL
#undef QK_AVG_POOL_KERNEL
  return "";
}

}  // namespace qk::plan
