"""The verbs and names of AIMET (aimet_torch) over the core of qkernels, with `sim.convert()` for real integers.

    import qkernels.frontends.aimet as aimet
    from qkernels.frontends.aimet import batch_norm_fold, model_preparer, quantsim

See docs/frontends.md.
"""

from qkernels.frontends.aimet import (
    adaround_weight,
    batch_norm_fold,
    bn_reestimation,
    cross_layer_equalization,
    encodings,
    model_preparer,
    nn,
    quantization,
    quantsim,
)
from qkernels.frontends.aimet.quantizers import QuantizeDequantize
from qkernels.frontends.aimet.quantsim import QuantizationSimModel, QuantScheme

__all__ = [
    "QuantScheme",
    "QuantizationSimModel",
    "QuantizeDequantize",
    "adaround_weight",
    "batch_norm_fold",
    "bn_reestimation",
    "cross_layer_equalization",
    "encodings",
    "model_preparer",
    "nn",
    "quantization",
    "quantsim",
]
