"""Quantizers under the names by which AIMET's scripts make them."""

from qkernels.frontends.aimet.quantization import affine
from qkernels.frontends.aimet.quantizers import QuantizeDequantize

__all__ = ["QuantizeDequantize", "affine"]
