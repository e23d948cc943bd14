"""Bias correction: takes the mean error of weight and activation rounding out of every layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.core import graph as g
from qkernels.core.layers import Prepared
from qkernels.core.prepare import quantizers
from qkernels.core.quantizer import State
from qkernels.errors import InvalidArgument, InvalidState


@torch.no_grad()
def correct_bias(prepared: nn.Module, batch: Any) -> None:
    """Shifts the biases of a calibrated model so that no channel of a layer is off on average. Changes `prepared`.

    Rounding a weight moves the mean of a channel's output, most where few products are summed: depthwise convolutions
    lose the most, and networks made of them (MobileNet, EfficientNet) gain the most. The layers are corrected in the
    order of execution, each on the corrected outputs of those before it, in one forward.

    Args:
        prepared: a model from `prepare`, after calibration and before `convert`.
        batch: one batch as for `prepare`'s example_inputs; 32 to 64 images of the calibration data do.

    >>> import qkernels
    >>> prepared = qkernels.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.randn(2, 4))
    >>> with qkernels.calibrating(prepared):
    ...     _ = prepared(torch.randn(8, 4))
    >>> qkernels.correct_bias(prepared, torch.randn(64, 4))
    """
    layers = [module for module in prepared.modules() if isinstance(module, Prepared)]
    if not layers:
        raise InvalidArgument("correct_bias: the model must come from `prepare` and have a linear or convolution")
    if any(not quantizer.has_grid() for quantizer in quantizers(prepared)):
        raise InvalidState("correct_bias: calibrate first: run batches inside `with qkernels.calibrating(prepared):`")
    args, kwargs = g.arguments(batch)
    expected: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        expected.setdefault(layer, _channel_means(layer, output))

    corrected: set[nn.Module] = set()

    def correct(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if layer in corrected:  # a second call already runs with the new bias
            return None
        corrected.add(layer)
        shift = expected[layer] - _channel_means(layer, output)
        layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)
        return output + shift.reshape(_along_channels(layer, output))

    with _without_rounding(prepared), _hooked(layers, note):
        prepared(*args, **kwargs)
    with _hooked(layers, correct):
        prepared(*args, **kwargs)


def _channel_dim(layer: nn.Module, output: Tensor) -> int:
    return output.dim() - 1 if isinstance(layer, nn.Linear) else output.dim() - layer.weight.dim() + 1


def _along_channels(layer: nn.Module, output: Tensor) -> list[int]:
    channel = _channel_dim(layer, output)
    return [-1 if d == channel else 1 for d in range(output.dim())]


def _channel_means(layer: nn.Module, output: Tensor) -> Tensor:
    channel = _channel_dim(layer, output)
    return output.movedim(channel, 0).flatten(1).double().mean(1).to(output.dtype)


@contextmanager
def _without_rounding(prepared: nn.Module) -> Iterator[None]:
    """Every Quantizer passes its tensor on."""
    states = {quantizer: quantizer.state for quantizer in quantizers(prepared)}
    for quantizer in states:
        quantizer.state = State.OFF
    try:
        yield
    finally:
        for quantizer, state in states.items():
            quantizer.state = state


@contextmanager
def _hooked(layers: list[nn.Module], hook: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
