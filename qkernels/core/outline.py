"""Example inputs that nobody gave: remembered by their kinds, or guessed from the first layer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkernels.core import operations as o

SIZES = (224, 32, 28, 64, 96, 128, 256, 299, 160, 192, 112, 16, 8, 48, 240, 320, 512, 100, 50)


def outline(value: Any) -> Any:
    """Arguments with (shape, dtype, device) in the place of each tensor: what remains of an example."""
    if isinstance(value, Tensor):
        return _Outline(tuple(value.shape), value.dtype, value.device)
    if isinstance(value, Mapping):
        return {k: outline(v) for k, v in value.items()}
    return type(value)(outline(v) for v in value) if type(value) in (tuple, list) else value


class _Outline(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def example(value: Any) -> Any:
    """Arguments of the kinds that an outline remembers, with arbitrary numbers."""
    if isinstance(value, _Outline):
        shape, dtype, device = value
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype, device=device)
        return _random(shape, dtype).to(device)
    if isinstance(value, Mapping):
        return {k: example(v) for k, v in value.items()}
    return type(value)(example(v) for v in value) if type(value) in (tuple, list) else value


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(0), device="cpu")


def guessed_input(model: nn.Module) -> torch.Tensor | None:
    """A tensor that the model, float or prepared, accepts: only its rank matters, not its size."""
    classes = ((m, getattr(m, "float_class", type(m))) for m in model.modules())
    layer = next((m for m, cls in classes if o.MODULES.get(cls) in o.WEIGHTED), None)
    if layer is None:
        return None
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    dims = layer.weight.dim() - 2
    shapes = [(1, channels, *[size] * dims) for size in SIZES] if dims else [(1, channels), (1, 1, channels)]
    for shape in shapes:
        x = _random(shape, torch.float32).to(layer.weight.device)
        try:
            with torch.no_grad():
                model(x)
        except (RuntimeError, ValueError, TypeError):  # this shape does not fit
            continue
        return x
    return None
