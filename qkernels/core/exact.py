"""`exact`: the prepared model evaluated with the integers of the converted one."""

import copy

import torch
from torch import nn

from qkernels.core.convert import convert
from qkernels.core.expect import expect_calibrated
from qkernels.core.registry import is_layer
from qkernels.errors import InvalidArgument

ENGINES = ("reference", "kernels")


class ReferenceLayer(nn.Module):
    """A converted layer computed by `qkernels.reference`, in plain torch."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        with torch.device("cpu"):  # where the reference makes its constants, whatever torch's default is
            y = self.layer.reference_forward(*args, **kwargs)
        # Where the kernels put it: a float operation after the layer may sum in memory order.
        memory = self.layer.output_memory(y, *args, **kwargs)
        return y if y.stride() == memory.stride() else memory.copy_(y)


def exact(prepared: nn.Module, engine: str = "reference") -> nn.Module:
    """A module that gives bit for bit the outputs that the converted model will give.

    Args:
        prepared: a calibrated model.
        engine: "reference" evaluates in plain torch, slowly, without any kernel of qkernels; "kernels" evaluates with
            the kernels.

    Raises:
        InvalidType, InvalidArgument, InvalidState: the model is not a calibrated one, or there is no such engine.
    """
    expect_calibrated("exact", prepared)
    if engine not in ENGINES:
        raise InvalidArgument(f"exact: engine must be one of {list(ENGINES)}, got {engine!r}")
    converted = convert(prepared)
    return converted if engine == "kernels" else by_reference(converted)


def by_reference(converted: nn.Module) -> nn.Module:
    """A copy of a converted model whose layers compute by `qkernels.reference`."""
    model = copy.deepcopy(converted)
    for path, module in list(model.named_modules()):
        if is_layer(module):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ReferenceLayer(module))
    return model
