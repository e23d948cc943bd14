"""The tensor operations: a documented wrapper, shape rule and gradient for each op of `python/schema.cpp`.

This package is the only user of `torch.ops.qkernels`. `qkernels.reference` holds the same operations in plain torch.
"""

from qkernels.ops.batch_norm import (
    BatchStatistics,
    batch_norm_fake_quant,
    batch_norm_statistics,
    norm_fake_quant,
    norm_fake_quant_backward,
)
from qkernels.ops.binary import (
    binary_conv2d,
    binary_linear,
    binary_sign,
    binary_sign_backward,
    binary_weight_pack,
    pack_signs,
)
from qkernels.ops.conv import conv, conv_geometry, conv_output_size, conv_pack, conv_padding, pack_on_grid
from qkernels.ops.elementwise import add, cat, lookup, mul
from qkernels.ops.epilogue import Epilogue, ResidualAdd
from qkernels.ops.fake_quant import (
    fake_quant,
    fake_quant_backward,
    fake_quant_backward_out,
    fake_quant_codes,
    fake_quant_mask,
    fake_quant_mask_backward,
    fake_quant_out,
)
from qkernels.ops.foreach import foreach_fake_quant, foreach_fake_quant_backward, foreach_observe_fake_quant
from qkernels.ops.linear import linear, linear_pack
from qkernels.ops.lsq import lsq, lsq_backward, lsq_backward_out, lsq_out
from qkernels.ops.observe import (
    observe,
    observe_fake_quant,
    observe_fake_quant_out,
    observe_histogram,
    observe_minmax,
)
from qkernels.ops.pool import adaptive_avg_pool, avg_pool, max_pool
from qkernels.ops.quantize import dequantize, dequantize_out, quantize, quantize_out
from qkernels.ops.rows import linear_rows, quantize_rows
from qkernels.ops.rules import (
    dorefa_gradient,
    dorefa_weight,
    dorefa_weight_backward,
    pact,
    pact_backward,
    round_gradient,
)

__all__ = [
    "BatchStatistics",
    "Epilogue",
    "ResidualAdd",
    "adaptive_avg_pool",
    "add",
    "avg_pool",
    "batch_norm_fake_quant",
    "batch_norm_statistics",
    "binary_conv2d",
    "binary_linear",
    "binary_sign",
    "binary_sign_backward",
    "binary_weight_pack",
    "cat",
    "conv",
    "conv_geometry",
    "conv_output_size",
    "conv_pack",
    "conv_padding",
    "dequantize",
    "dequantize_out",
    "dorefa_gradient",
    "dorefa_weight",
    "dorefa_weight_backward",
    "fake_quant",
    "fake_quant_backward",
    "fake_quant_backward_out",
    "fake_quant_codes",
    "fake_quant_mask",
    "fake_quant_mask_backward",
    "fake_quant_out",
    "foreach_fake_quant",
    "foreach_fake_quant_backward",
    "foreach_observe_fake_quant",
    "linear",
    "linear_pack",
    "linear_rows",
    "lookup",
    "lsq",
    "lsq_backward",
    "lsq_backward_out",
    "lsq_out",
    "max_pool",
    "mul",
    "norm_fake_quant",
    "norm_fake_quant_backward",
    "observe",
    "observe_fake_quant",
    "observe_fake_quant_out",
    "observe_histogram",
    "observe_minmax",
    "pack_on_grid",
    "pack_signs",
    "pact",
    "pact_backward",
    "quantize",
    "quantize_out",
    "quantize_rows",
    "round_gradient",
]
