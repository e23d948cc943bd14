"""`aimet.nn`: the context that calibrates, and the quantized modules (`QuantizedConv2d`, ...) to tell them by."""

from typing import Any

from qkernels.frontends.aimet import quantizers
from qkernels.frontends.aimet.quantizers import QuantizationMixin, compute_encodings

__all__ = ["QuantizationMixin", "compute_encodings"]


def __getattr__(name: str) -> Any:
    if name.startswith("Quantized"):
        return getattr(quantizers, name)
    raise AttributeError(name)
