"""Part streams: calls on several streams at once do not disturb one another."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import device
from cases import Cases
from device import all_equal, tensors
from large_cases import large_calls, on_device
from weighted_cases import TILED_CONV, ConvCase, conv_arguments, conv_cases, some_linear

from qkernels import ops

STREAMS, TURNS = 4, 40
JOINED = (
    *("lsq_backward", "lsq_backward of columns", "observe_minmax", "observe_minmax of rows", "observe"),
    *("observe_histogram", "foreach_observe_fake_quant", "quantize_rows", "batch_norm_statistics"),
    *("norm_fake_quant_backward", "dorefa_weight"),
)


def on_several(calls: Sequence[Callable[[], Any]], turns: int = TURNS) -> None:
    """Each call gives on any stream what it gives alone."""
    expected = [[t.clone() for t in tensors(call())] for call in calls]
    device.synchronize()
    streams = device.streams(STREAMS)
    found = []
    for turn in range(turns):
        which = turn % len(calls)
        with device.stream(streams[turn % STREAMS]):
            found.append((which, tensors(calls[which]())))
    device.synchronize()
    for turn, (which, got) in enumerate(found):
        try:
            all_equal(got, expected[which])
        except AssertionError as error:
            raise AssertionError(f"streams disturb one another, turn {turn}, call {which}: {error}") from None


def a_conv(small: bool) -> ConvCase:
    """Where it is not small: one of those with a split of K, on a GPU of 132 multiprocessors."""
    layer = str(TILED_CONV[3])
    cases = conv_cases(small)
    return next(c for c in cases if small or layer in c.name)


def some_calls(small: bool) -> dict[str, Callable[[], Any]]:
    """Operations that have a workspace, or join in a second kernel what blocks have found."""
    packed, x = some_linear(16, 256, 256 if small else 8192)
    convolution = conv_arguments(a_conv(small))
    found = large_calls(small)
    return {
        "linear with a split of K": lambda: ops.linear(x, packed, 256),
        "conv": lambda: ops.conv(*convolution),
        **{name: on_device(*found[name]) for name in JOINED},
    }


def streams(small: bool) -> Cases:
    calls = some_calls(small)
    for name, call in calls.items():
        yield f"{TURNS} calls of {name} on {STREAMS} streams", functools.partial(on_several, [call])
    # As many as have no divisor with the number of streams: each comes to be on each of them.
    several = list(calls.values())
    assert math.gcd(len(several), STREAMS) == 1
    yield "everything at once", functools.partial(on_several, several, len(several) * TURNS)
