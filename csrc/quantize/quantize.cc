#include "csrc/quantize/quantize.h"

namespace qk {

QuantizeKernel select_quantize_kernel(FloatType type, CpuFeatures features) {
#define QK_QUANTIZE_KERNEL(need, kernel_type, name) \
  if (type == kernel_type && has_features(features, need)) return name;
#define QK_DEQUANTIZE_KERNEL(need, kernel_type, name)
#include "csrc/quantize/kernels.inc"
#undef QK_QUANTIZE_KERNEL
#undef QK_DEQUANTIZE_KERNEL
  return nullptr;
}

DequantizeKernel select_dequantize_kernel(FloatType type, CpuFeatures features) {
#define QK_QUANTIZE_KERNEL(need, kernel_type, name)
#define QK_DEQUANTIZE_KERNEL(need, kernel_type, name) \
  if (type == kernel_type && has_features(features, need)) return name;
#include "csrc/quantize/kernels.inc"
#undef QK_QUANTIZE_KERNEL
#undef QK_DEQUANTIZE_KERNEL
  return nullptr;
}

void quantize(const QuantizeArgs& args, const Parallel& parallel) {
  const QuantizeKernel kernel = select_quantize_kernel(args.x_type);
  const char* x = static_cast<const char*>(args.x);
  char* q = static_cast<char*>(args.q);
  const int64_t bytes = float_bytes(args.x_type);
  for_each_grid_run(args.grid, parallel,
                    [&](int64_t q_offset, int64_t x_offset, int64_t n, const GridSpan& span) {
                      kernel({.x = x + x_offset * bytes,
                              .q = q + q_offset,
                              .n = n,
                              .grid = span,
                              .q_signed = args.q_signed,
                              .qmin = args.qmin,
                              .qmax = args.qmax});
                    });
}

void dequantize(const DequantizeArgs& args, const Parallel& parallel) {
  const DequantizeKernel kernel = select_dequantize_kernel(args.x_type);
  const char* q = static_cast<const char*>(args.q);
  char* x = static_cast<char*>(args.x);
  const int64_t bytes = float_bytes(args.x_type), q_bytes = code_bytes(args.q_type);
  const StridedLayout<2>& in = args.grid.strided;
  const bool stream = in.rows() * in.inner() * bytes >= kStreamBytes;
  for_each_grid_run(
      args.grid, parallel,
      [&](int64_t x_offset, int64_t q_offset, int64_t n, const GridSpan& span) {
        kernel({.q = q + q_offset * q_bytes,
                .x = x + x_offset * bytes,
                .n = n,
                .grid = span,
                .q_type = args.q_type,
                .stream = stream});
      },
      stream_fence);
}

}  // namespace qk
