"""Bias correction: takes the mean error of weight and activation rounding out of every layer.

Rounding a weight moves the mean of a channel's output, most where few products are summed: depthwise convolutions lose
the most, and networks made of them (MobileNet, EfficientNet) gain the most. The layers are corrected in the order of
execution, each on the corrected outputs of those before it, in one forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.core.corrections import BiasCorrection
from qkernels.core.layers import Prepared
from qkernels.core.prepare import quantizers
from qkernels.core.quantizer import State
from qkernels.core.samples import Samples, merged


@torch.no_grad()
def correct_bias(prepared: nn.Module, layers: Sequence[Prepared], samples: Samples, options: BiasCorrection) -> None:
    """Gives every one of `layers` the correction that its channels have the means of the float model with."""
    args, kwargs = merged(samples.first(options.samples))
    expected: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        expected.setdefault(layer, _channel_means(layer, output))

    corrected: set[nn.Module] = set()

    def correct(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if layer in corrected:  # a second call already runs with the new bias
            return None
        corrected.add(layer)
        shift = expected[layer] - _channel_means(layer, output)
        layer.bias_correction.copy_(shift)
        return output + shift.reshape(_along_channels(layer, output))

    with without_rounding(prepared), hooked(layers, note):
        prepared(*args, **kwargs)
    with hooked(layers, correct):
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
def without_rounding(prepared: nn.Module) -> Iterator[None]:
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
def hooked(layers: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    """Inside, `hook` is a forward hook of every layer."""
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
