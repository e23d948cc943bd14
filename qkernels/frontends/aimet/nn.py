"""`aimet.nn`: the context that calibrates, and the quantized modules."""

from qkernels.frontends.aimet.quantizers import QuantizationMixin, compute_encodings

__all__ = ["QuantizationMixin", "compute_encodings"]
