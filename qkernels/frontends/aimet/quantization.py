"""`aimet.quantization.affine.QuantizeDequantize`: quantizers under the names by which AIMET's scripts make them."""

from types import SimpleNamespace

from qkernels.frontends.aimet.quantizers import QuantizeDequantize

__all__ = ["QuantizeDequantize", "affine"]
affine = SimpleNamespace(QuantizeDequantize=QuantizeDequantize)
