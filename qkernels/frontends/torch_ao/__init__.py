# ruff: noqa: F401
"""The verbs and names of `torch.ao.quantization` over the core of qkernels: converted models run on its int8 kernels.

    from qkernels.frontends import torch_ao

in the place of `torch.ao.quantization`; or, for a script that writes the full name `torch.ao.quantization.prepare`,

    from qkernels.frontends.torch_ao import torch

in the place of `import torch`: torch itself, except that `torch.ao.quantization` is this module. See docs/frontends.md.
"""

import sys
from typing import Any

import torch.ao.quantization as original
from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig

from qkernels.errors import close_matches
from qkernels.frontends.torch_ao import qparams
from qkernels.frontends.torch_ao.dynamic import quantize_dynamic
from qkernels.frontends.torch_ao.eager import convert, prepare, prepared, propagate_qconfig, quantize, recipe
from qkernels.frontends.torch_ao.fuse import fuse_modules, fuse_modules_qat
from qkernels.frontends.torch_ao.fx import (
    QConfigMapping,
    convert_fx,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
    mapping_recipe,
    prepare_fx,
)
from qkernels.frontends.torch_ao.names import torch
from qkernels.frontends.torch_ao.observers import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FixedQParamsObserver,
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    default_fake_quant,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_histogram_fake_quant,
    default_histogram_observer,
    default_observer,
    default_per_channel_qconfig,
    default_per_channel_symmetric_qnnpack_qconfig,
    default_per_channel_weight_fake_quant,
    default_per_channel_weight_observer,
    default_qat_qconfig,
    default_qat_qconfig_v2,
    default_qconfig,
    default_symmetric_qnnpack_qconfig,
    default_weight_fake_quant,
    default_weight_observer,
    get_default_qat_qconfig,
    get_default_qconfig,
    per_channel_weight_observer_range_neg_127_to_127,
    weight_observer_range_neg_127_to_127,
)
from qkernels.frontends.torch_ao.qat import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    freeze_bn_stats,
    prepare_qat,
    prepare_qat_fx,
    quantize_qat,
    update_bn_stats,
)
from qkernels.frontends.torch_ao.stubs import DeQuantStub, FloatFunctional, QuantStub, QuantWrapper

SUBMODULES = ("fake_quantize", "observer", "qconfig", "qconfig_mapping", "quantize_fx")


def __getattr__(name: str) -> Any:
    """SUBMODULES of torch.ao.quantization are this module; names without a counterpart say what to do."""
    if name in SUBMODULES:
        return sys.modules[__name__]
    if name in dir(original):
        raise AttributeError(
            f"qkernels.frontends.torch_ao has no {name}; it takes the place of torch.ao's eager and FX quantization, "
            "see docs/frontends.md"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{close_matches(name, globals())}")
