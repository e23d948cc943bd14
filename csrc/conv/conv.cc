#include "csrc/conv/conv.h"

#include "csrc/conv/depthwise.h"
#include "csrc/conv/implicit_gemm.h"
#include "csrc/conv/winograd.h"

namespace qk {

bool conv_reads_slices(const PackedConvHeader& packed) {
  if (packed.kind == ConvKind::kDepthwise) return true;
  const ConvShape& shape = packed.shape;
  bool pointwise = !shape.transposed && !is_padded(shape);
  for (int d = 0; d < kConvDims; ++d) {
    pointwise = pointwise && shape.kernel[d] == 1 && shape.stride[d] == 1;
  }
  return pointwise;
}

int64_t conv_weight_bytes(const ConvArgs& args, int64_t threads) {
  const PackedConvHeader& packed = *args.packed;
  return uses_winograd(args, threads) ? packed.bytes - packed.winograd_offset : packed.parts_end();
}

NextWeights conv_first_weights(const ConvArgs& args, int64_t threads) {
  if (args.packed->kind != ConvKind::kIgemm) return {};
  return uses_winograd(args, threads) ? winograd_first_weights(args)
                                      : first_weights(conv_part(*args.packed, 0));
}

int64_t conv_workspace_bytes(const ConvArgs& args, const Parallel& parallel) {
  if (args.packed->kind == ConvKind::kDepthwise) return depthwise_workspace_bytes(args, parallel);
  return uses_winograd(args, parallel.threads) ? winograd_workspace_bytes(args, parallel)
                                               : implicit_gemm_workspace_bytes(args, parallel);
}

void conv(const ConvArgs& args, const Parallel& parallel) {
  if (args.extent.batch == 0) return;
  if (args.packed->has_fill) fill_outputs(args, parallel);
  if (args.packed->kind == ConvKind::kDepthwise) {
    depthwise(args, parallel);
  } else if (uses_winograd(args, parallel.threads)) {
    winograd(args, parallel);
  } else {
    implicit_gemm(args, parallel);
  }
}

}  // namespace qk
