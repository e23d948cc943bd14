"""Bias correction: takes the mean error of weight and activation rounding out of every layer.

Rounding a weight moves the mean of a channel's output, most where few products are summed: depthwise convolutions lose
the most, and networks made of them (MobileNet, EfficientNet) gain the most. The layers are corrected in the order of
execution, each on the corrected outputs of those before it. The calls of the calibration run side by side for that, as
they came: nobody can tell from outside along which dimension a model could take them together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.core.corrections import BiasCorrection
from qkernels.core.layers import Prepared
from qkernels.core.lockstep import Meeting
from qkernels.core.observers import sum_over_ranks
from qkernels.core.prepare import quantizers
from qkernels.core.quantizer import State
from qkernels.core.samples import Samples


@torch.no_grad()
def correct_bias(prepared: nn.Module, layers: Sequence[Prepared], samples: Samples, options: BiasCorrection) -> None:
    """Gives every one of `layers` the correction that its channels have the means of the float model with."""
    calls = samples.first(options.samples)
    expected: dict[nn.Module, Tensor] = {}

    for args, kwargs in calls:
        seen: set[nn.Module] = set()

        def note(layer: nn.Module, inputs: Any, output: Tensor, seen: set[nn.Module] = seen) -> None:
            if layer not in seen:  # as below, the first call of a layer that a model calls again
                seen.add(layer)
                sums = _channel_sums(layer, output)
                expected[layer] = expected[layer] + sums if layer in expected else sums

        with without_rounding(prepared), hooked(layers, note):
            prepared(*args, **kwargs)

    def settle(layer: Prepared, sums: list[Tensor]) -> Tensor:
        both = torch.stack([expected[layer], torch.stack(sums).sum(0)])
        sum_over_ranks(both)
        means = both[:, :-1] / both[:, -1:].clamp(min=1)
        layer.bias_correction.copy_(means[0] - means[1])
        return layer.bias_correction

    meeting = Meeting(settle)
    corrected: set[nn.Module] = set()

    def correct(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if layer in corrected or layer not in expected:  # a second call already runs with the new bias
            return None
        shift = meeting.ask(layer, _channel_sums(layer, output))
        corrected.add(layer)
        return output + shift.reshape(_along_channels(layer, output))

    with hooked(layers, correct):
        meeting.run([partial(prepared, *args, **kwargs) for args, kwargs in calls])


def _channel_dim(layer: nn.Module, output: Tensor) -> int:
    return output.dim() - 1 if isinstance(layer, nn.Linear) else output.dim() - layer.weight.dim() + 1


def _along_channels(layer: nn.Module, output: Tensor) -> list[int]:
    channel = _channel_dim(layer, output)
    return [-1 if d == channel else 1 for d in range(output.dim())]


def _channel_sums(layer: nn.Module, output: Tensor) -> Tensor:
    """The sum of each channel, and how many numbers it is of, in float64."""
    channels = output.movedim(_channel_dim(layer, output), 0).unsqueeze(-1).flatten(1).double()
    return torch.cat([channels.sum(1), channels.new_tensor([channels.shape[1]])])


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
