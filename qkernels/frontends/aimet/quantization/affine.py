"""`aimet.quantization.affine.QuantizeDequantize`."""

from qkernels.frontends.aimet.quantizers import QuantizeDequantize

__all__ = ["QuantizeDequantize"]
