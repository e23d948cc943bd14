"""The tensor operations: a documented wrapper, shape rule and gradient for each op of `python/schema.cpp`.

This package is the only user of `torch.ops.qkernels`. `qkernels.reference` holds the same operations in plain torch.
"""

from qkernels.ops.fake_quant import fake_quant, fake_quant_out

__all__ = ["fake_quant", "fake_quant_out"]
